"""When things happen in a run, in optimizer steps: its length, evaluations, checkpoints, and the learning rate."""

import math
from collections.abc import Callable

from fastvit_engine.config import Config
from fastvit_engine.duration import to_steps
from fastvit_engine.errors import UserError


def learning_rate_schedule(config: Config, total_steps: int, samples_per_epoch: int | None) -> Callable[[int], float]:
    """The learning rate of each step in [0, total_steps).

    linear and cosine fall from `optimizer.learning_rate` at the end of warm-up to `schedule.final_learning_rate` after
    the last step (ViT paper, Table 3). rsqrt multiplies by sqrt(timescale / (t + timescale)), t counted from the end of
    warm-up, and falls linearly to the final rate during the cooldown (Scaling Vision Transformers, section 3.5).
    """

    def steps(name: str) -> int:
        return to_steps(
            getattr(config.schedule, name),
            key=f"schedule.{name}",
            global_batch_size=config.train.global_batch_size,
            samples_per_epoch=samples_per_epoch,
            total_steps=total_steps,
        )

    kind = config.schedule.kind
    base, final = config.optimizer.learning_rate, config.schedule.final_learning_rate
    warmup = steps("warmup")
    cooldown = steps("cooldown") if kind == "rsqrt" else 0
    timescale = max(1, steps("timescale")) if kind == "rsqrt" else 1
    if warmup + cooldown > total_steps:
        needed = f"warm-up of {warmup}" + (f" and cooldown of {cooldown}" if cooldown else "")
        raise UserError(
            f"schedule: {needed} steps is longer than the whole run of {total_steps} steps: "
            "shorten schedule.warmup or lengthen train.duration"
        )

    def learning_rate(step: int) -> float:
        if step < warmup:
            return base * (step + 1) / warmup
        elapsed = step - warmup
        progress = elapsed / max(1, total_steps - warmup)
        if kind == "constant":
            return base
        if kind == "linear":
            return base + (final - base) * progress
        if kind == "cosine":
            return final + (base - final) * (1 + math.cos(math.pi * progress)) / 2
        rate = base * math.sqrt(timescale / (elapsed + timescale))
        remaining = (total_steps - step) / cooldown if cooldown else 1.0
        return rate if remaining >= 1 else final + (rate - final) * remaining

    return learning_rate


class Schedule:
    """The durations of a configuration in steps of its global batch.

    `total_steps` is the length of the run, `learning_rate(step)` the rate of each step in [0, total_steps).
    Raises UserError if a duration cannot be converted, or the parts of the schedule do not fit.
    """

    def __init__(self, config: Config, samples_per_epoch: int | None) -> None:
        self.samples_per_epoch = samples_per_epoch
        self.global_batch_size = config.train.global_batch_size
        self.total_steps = self._steps("train.duration", config.train.duration)
        if self.total_steps == 0:
            raise UserError(f"train.duration = '{config.train.duration}' is less than one step of the global batch")
        evaluates = config.data.eval is not None
        # 0: only after the last step
        self.evaluate_every = self._steps("evaluate.every", config.evaluate.every, self.total_steps) if evaluates else 0
        self.save_every = self._steps("checkpoint.every", config.checkpoint.every, self.total_steps)
        self.keep_every = self._steps("checkpoint.keep_every", config.checkpoint.keep_every, self.total_steps) or None
        best = config.checkpoint.keep_best
        if best is not None and not self.evaluates_what_it_saves:
            raise UserError(
                f"checkpoint.keep_best = {best} needs an evaluation wherever a checkpoint is written: "
                "let evaluate.every divide checkpoint.every"
            )
        self.learning_rate = learning_rate_schedule(config, self.total_steps, self.samples_per_epoch)

    def is_due(self, every: int, step: int) -> bool:
        """Whether what happens after every so many steps, and at the end of the run, is due once `step` are done."""
        return step == self.total_steps or (every > 0 and step % every == 0)

    @property
    def evaluates_what_it_saves(self) -> bool:
        """Whether an evaluation is due at every step with a checkpoint."""
        return self.save_every == 0 or (self.evaluate_every > 0 and self.save_every % self.evaluate_every == 0)

    def epoch(self, step: int) -> float | None:
        """Epochs after `step` steps; None if the number of training samples is unknown."""
        return step * self.global_batch_size / self.samples_per_epoch if self.samples_per_epoch else None

    def _steps(self, key: str, duration: str | None, total_steps: int | None = None) -> int:
        if duration is None:
            return 0
        return to_steps(
            duration,
            key=key,
            global_batch_size=self.global_batch_size,
            samples_per_epoch=self.samples_per_epoch,
            total_steps=total_steps,
        )
