"""The average of the weights as the teacher of an objective."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor

from fastvit_engine.errors import UserError
from fastvit_engine.objectives import Taught
from fastvit_engine.train.job import Job


class Teacher:
    """Lends a job's average to its objective, in the middle of a step."""

    def __init__(self, job: Job) -> None:
        self.job = job

    @contextmanager
    def applied(self) -> Iterator[None]:
        """See `WeightAverage.applied`. A save that is copying the weights is waited for."""
        assert self.job.ema is not None
        self.job.checkpointer.before_update()
        with self.job.ema.applied():
            yield

    def add_up(self, values: Tensor) -> Tensor:
        return self.job.world.sum_in_place(values)

    def gather(self, rows: Tensor) -> tuple[Tensor, int]:
        most = self.job.split.micro_batch_size
        filled = F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, most - len(rows)))
        return self.job.world.gather_rows(filled), self.job.world.rank * most


def begin_teaching(job: Job) -> None:
    """Gives the objective its teacher, if it learns from one. Raises UserError if there is none."""
    if not isinstance(job.objective, Taught):
        return
    if job.ema is None:
        raise UserError(
            f"the objective {job.config.train.objective} learns from the average of the weights, and there is none: "
            "set ema.decay"
        )
    job.objective.learn_from(Teacher(job))
