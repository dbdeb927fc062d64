"""When things happen in a run, in optimizer steps: its length, evaluations, checkpoints, and the learning rate.

If the global batch of a run changes when it resumes, what has a length in epochs or samples keeps it, and takes another
number of steps; what has a length in steps keeps that. Each part of the schedule proceeds in its own unit, so the
learning rate does not jump at the change. Intervals ("every epoch") are converted with the batch of today, and counted
from step 0.
"""

import math
from collections.abc import Callable

from fastvit_engine.config import Config
from fastvit_engine.duration import BatchSizes, parse_duration, to_steps
from fastvit_engine.errors import UserError
from fastvit_engine.train.phases import phases_of

_SAMPLES = BatchSizes.always(1)  # with these, a duration in steps of one sample is one in samples


def learning_rate_schedule(
    config: Config, total_steps: int, samples_per_epoch: int | None, batch_sizes: BatchSizes | None = None
) -> Callable[[int], float]:
    """The learning rate of each step in [0, total_steps).

    linear and cosine fall from `optimizer.learning_rate` at the end of warm-up to `schedule.final_learning_rate` after
    the last step (ViT paper, Table 3). rsqrt multiplies by sqrt(timescale / (t + timescale)), t counted from the end of
    warm-up, and falls linearly to the final rate during the cooldown (Scaling Vision Transformers, section 3.5).

    batch_sizes: of the run so far; by default the configuration's, from the beginning.
    """
    sizes = batch_sizes or BatchSizes.always(config.train.global_batch_size)
    run_unit = parse_duration(config.train.duration)[1]

    def in_samples(name: str) -> bool:
        """Whether a part of the schedule counts samples: the batch changed, and its length is not in steps."""
        unit = parse_duration(getattr(config.schedule, name))[1]
        return len(sizes.changes) > 1 and (run_unit if unit == "%" else unit) != "step"

    def clock(samples: bool) -> Callable[[int], int]:
        return sizes.samples if samples else lambda step: step

    def length(name: str) -> int:
        """Of a part of the schedule, as its clock counts."""
        return to_steps(
            getattr(config.schedule, name),
            key=f"schedule.{name}",
            batch_sizes=_SAMPLES if in_samples(name) else sizes,
            samples_per_epoch=samples_per_epoch,
            total_steps=clock(in_samples(name))(total_steps),
        )

    kind = config.schedule.kind
    base, final = config.optimizer.learning_rate, config.schedule.final_learning_rate
    run = clock(len(sizes.changes) > 1 and run_unit != "step")
    ramp, fall, root = (clock(in_samples(name)) for name in ("warmup", "cooldown", "timescale"))
    warmup = length("warmup")
    warm = math.ceil(sizes.steps(warmup)) if in_samples("warmup") else warmup  # steps
    cooldown = length("cooldown") if kind == "rsqrt" else 0
    timescale = max(1, length("timescale")) if kind == "rsqrt" else 1
    if warm > total_steps or fall(total_steps) - fall(warm) < cooldown:
        unit = " samples" if cooldown and in_samples("cooldown") else " steps"
        needed = f"warm-up of {warm}" + (f" and cooldown of {cooldown}" if cooldown else "")
        raise UserError(
            f"schedule: {needed}{unit} is longer than the whole run of {total_steps} steps: "
            "shorten schedule.warmup or lengthen train.duration"
        )

    def learning_rate(step: int) -> float:
        if step < warm:
            return base * min(ramp(step + 1), warmup) / warmup
        progress = (run(step) - run(warm)) / max(1, run(total_steps) - run(warm))
        if kind == "constant":
            return base
        if kind == "linear":
            return base + (final - base) * progress
        if kind == "cosine":
            return final + (base - final) * (1 + math.cos(math.pi * progress)) / 2
        rate = base * math.sqrt(timescale / (root(step) - root(warm) + timescale))
        remaining = (fall(total_steps) - fall(step)) / cooldown if cooldown else 1.0
        return rate if remaining >= 1 else final + (rate - final) * remaining

    return learning_rate


class Schedule:
    """The durations of a configuration in steps of its global batch.

    `total_steps` is the length of the run, `learning_rate(step)` the rate of each step in [0, total_steps), `phases`
    what each step sees of its images.
    Raises UserError if a duration cannot be converted, or the parts of the schedule do not fit.
    """

    def __init__(self, config: Config, samples_per_epoch: int | None, batch_sizes: BatchSizes | None = None) -> None:
        """`batch_sizes`: of the run so far; by default the configuration's, from the beginning."""
        self.samples_per_epoch = samples_per_epoch
        self.batch_sizes = batch_sizes or BatchSizes.always(config.train.global_batch_size)
        self.total_steps = to_steps(
            config.train.duration,
            key="train.duration",
            batch_sizes=self.batch_sizes,
            samples_per_epoch=samples_per_epoch,
        )
        if self.total_steps == 0:
            raise UserError(f"train.duration = '{config.train.duration}' is less than one step of the global batch")
        self._evaluate_every = config.evaluate.every
        evaluates = config.data.eval is not None
        # 0: only after the last step
        self.evaluate_every = self._interval("evaluate.every", config.evaluate.every) if evaluates else 0
        few_shot = config.evaluate.fewshot
        measures = few_shot.train is not None
        every = self._interval("evaluate.fewshot.every", few_shot.every) if measures else 0
        self.few_shot_every = 0 if config.optimizer.frozen == "backbone" else every  # features that stay as they are
        self.save_every = self._interval("checkpoint.every", config.checkpoint.every)
        self.keep_every = self._interval("checkpoint.keep_every", config.checkpoint.keep_every) or None
        best = config.checkpoint.keep_best
        if best is not None and not self.evaluates_what_it_saves:
            raise UserError(
                f"checkpoint.keep_best = {best} needs an evaluation wherever a checkpoint is written: "
                "let evaluate.every divide checkpoint.every"
            )
        self.learning_rate = learning_rate_schedule(config, self.total_steps, self.samples_per_epoch, self.batch_sizes)
        self.phases = phases_of(config, self.total_steps, self.samples_per_epoch, self.batch_sizes)

    @property
    def own_every(self) -> int:
        """Steps between two calls of an evaluator that `train` was given, which needs no `data.eval`."""
        return self._interval("evaluate.every", self._evaluate_every)

    def is_due(self, every: int, step: int) -> bool:
        """Whether what happens after every so many steps, and at the end of the run, is due once `step` are done."""
        return step == self.total_steps or (every > 0 and step % every == 0)

    def is_missed(self, every: int, before: int, step: int) -> bool:
        """Whether what happens every so many steps was due after more than `before` steps, and `step` are done."""
        return every > 0 and step // every > before // every

    @property
    def evaluates_what_it_saves(self) -> bool:
        """Whether an evaluation is due at every step with a checkpoint."""
        return self.save_every == 0 or (self.evaluate_every > 0 and self.save_every % self.evaluate_every == 0)

    def epoch(self, step: int) -> float | None:
        """Epochs after `step` steps; None if the number of training samples is unknown."""
        return self.samples(step) / self.samples_per_epoch if self.samples_per_epoch else None

    def samples(self, step: int) -> int:
        """Samples of the first `step` steps."""
        return self.batch_sizes.samples(step)

    def _interval(self, key: str, duration: str | None) -> int:
        if duration is None:
            return 0
        return to_steps(
            duration,
            key=key,
            batch_sizes=BatchSizes.always(self.batch_sizes.current),
            samples_per_epoch=self.samples_per_epoch,
            total_steps=self.total_steps,
        )
