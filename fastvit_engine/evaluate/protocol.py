"""What the training loop needs of an evaluation."""

from collections.abc import Sequence
from typing import Protocol

from torch import nn

from fastvit_engine.observe.metrics import EvaluationRow


class Evaluator(Protocol):
    """One way to measure a model in training. The loop runs it on the weights and on their average, if there is one."""

    name: str  # of its rows for the weights; those for the average get this name and "_ema"
    every_steps: int  # besides once after the last step; 0: only then

    def run(self, model: nn.Module, *, step: int, name: str) -> Sequence[EvaluationRow]:
        """Measures the model after `step` optimizer steps; collective. Leaves it in training mode if it was."""
