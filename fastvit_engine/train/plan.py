"""A run in optimizer steps: how many, when to evaluate and save, and the learning rate of each."""

from fastvit_engine.config import Config
from fastvit_engine.duration import to_steps
from fastvit_engine.errors import UserError
from fastvit_engine.train.schedule import build_schedule


class Plan:
    """`total_steps`, the `learning_rate` of each step, and after which steps to evaluate and to save."""

    def __init__(self, config: Config, samples_per_epoch: int | None) -> None:
        self.samples_per_epoch = samples_per_epoch
        self.global_batch_size = config.train.global_batch_size
        self.total_steps = self._steps(config.train.duration)
        if self.total_steps == 0:
            raise UserError(f"train.duration = '{config.train.duration}' is less than one step of the global batch")
        self._eval_every = self._steps(config.evaluate.every, self.total_steps)
        self._checkpoint_every = self._steps(config.checkpoint.every, self.total_steps)
        self.keep_every = self._steps(config.checkpoint.keep_every, self.total_steps) or None
        self.learning_rate = build_schedule(config, self.total_steps, self.samples_per_epoch)

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation is due once `step` steps are done; the end of the run is not counted."""
        return self._eval_every > 0 and step % self._eval_every == 0

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due once `step` steps are done; the end of the run is not counted."""
        return self._checkpoint_every > 0 and step % self._checkpoint_every == 0

    @property
    def evaluates_what_it_saves(self) -> bool:
        return self._checkpoint_every == 0 or self.evaluates_after(self._checkpoint_every)

    def epoch(self, step: int) -> float | None:
        return step * self.global_batch_size / self.samples_per_epoch if self.samples_per_epoch else None

    def _steps(self, duration: str | None, total_steps: int | None = None) -> int:
        if duration is None:
            return 0
        return to_steps(
            duration,
            global_batch_size=self.global_batch_size,
            samples_per_epoch=self.samples_per_epoch,
            total_steps=total_steps,
        )
