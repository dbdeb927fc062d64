"""What the training step needs of an objective."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from fastvit_engine.config import Config
from fastvit_engine.data import Batch


class Objective(Protocol):
    """Turns a micro-batch into losses, with one forward pass of the model."""

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of each sample, [B] on the device; 0 for a sample of weight 0.

        Whatever is random about it comes from `batch.seeds`, so that it is the same on any number of processes. The
        step's loss is the mean over the global batch.
        """


ObjectiveFactory = Callable[[Config, torch.device], Objective]  # the class of an objective is one
