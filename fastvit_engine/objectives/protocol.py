"""What the training step needs of an objective."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fastvit_engine.config import Config
from fastvit_engine.config.phases import Phase
from fastvit_engine.data import Batch


class Objective(Protocol):
    """Turns a micro-batch into losses, with one forward pass of the model."""

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of each sample, [B] on the device; 0 for a sample of weight 0.

        Whatever is random about it comes from `batch.seeds`, so that it is the same on any number of processes. The
        step's loss is the mean over the global batch.
        """


class Average(Protocol):
    """The moving average of a run's weights, as an objective uses it that takes it for a teacher."""

    def applied(self) -> AbstractContextManager[None]:
        """The model computes with the average inside the block, and with its own weights after it; collective."""

    def add_up(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes, the same on each, in its place; collective."""

    def gather(self, rows: Tensor) -> tuple[Tensor, int]:
        """The rows [B, ...] of all processes, one after the other [N, ...], and which is the first of this one's.

        Collective, in a step of one pass. A process with fewer rows than others is filled up with rows of zeros.
        """


@runtime_checkable
class Taught(Protocol):
    """An objective whose teacher is the average of the weights."""

    def learn_from(self, average: Average) -> None:
        """Called before the first step, and again whenever training goes back to a checkpoint."""

    def step_done(self, model: nn.Module) -> None:
        """Called on every process after each update, whose average is up to date."""


@runtime_checkable
class Phased(Protocol):
    """An objective that shows the model fewer tokens in some phases of a run."""

    def enter_phase(self, phase: Phase) -> None:
        """Called before each step: `losses` is of this phase from then on."""


ObjectiveFactory = Callable[[Config, torch.device], Objective]  # the class of an objective is one
