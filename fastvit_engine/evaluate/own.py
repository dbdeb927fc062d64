"""Evaluators of one's own: functions that measure the model while it trains, given to `fastvit_engine.train`."""

import time
from collections.abc import Callable, Mapping

import torch
from torch import nn

from fastvit_engine.errors import UserError
from fastvit_engine.observe.metrics import OwnRow

Measure = Callable[[nn.Module], Mapping[str, float]]
_TAKEN = ("eval", "fewshot", "train")  # names of other rows


def check_evaluators(evaluators: Mapping[str, Measure]) -> None:
    """Raises UserError for a name that rows cannot have, and for what is no function."""
    for name, measure in evaluators.items():
        if not isinstance(name, str) or not name.isidentifier() or name in _TAKEN or name.endswith("_ema"):
            raise UserError(
                f"evaluators has {name!r}: name an evaluator by letters, digits and _, but not {', '.join(_TAKEN)} or "
                "with _ema at its end, which other rows of metrics.jsonl have"
            )
        if not callable(measure):
            raise UserError(
                f"evaluators has {measure!r} as {name}: give a function of the model that returns numbers by name"
            )


class Own:
    """The evaluator that calls a function. All ranks call it, and the figures of rank 0 are recorded."""

    def __init__(self, name: str, measure: Measure, *, every_steps: int) -> None:
        self.name, self.measure, self.every_steps = name, measure, every_steps

    def run(self, model: nn.Module, *, step: int, name: str) -> list[OwnRow]:
        started, was_training = time.perf_counter(), model.training
        model.eval()
        try:
            with torch.no_grad():
                measured = self.measure(model)
        finally:
            model.train(was_training)
        return [
            {
                "step": step,
                "eval": name,
                "figures": self._numbers(measured),
                "seconds": time.perf_counter() - started,
            }
        ]

    def _numbers(self, measured: Mapping[str, float]) -> dict[str, float]:
        """As plain numbers: NumPy's, and tensors of one element, are numbers too."""
        try:
            numbers = {
                name: float(number.detach() if isinstance(number, torch.Tensor) else number)
                for name, number in measured.items()
            }
        except (AttributeError, TypeError, ValueError):
            numbers = {}
        if not numbers or not all(isinstance(name, str) for name in numbers):
            raise UserError(
                f"the evaluator {self.name} has returned {measured!r}: return numbers by name, such as "
                "{'recall': 0.5}"
            )
        return numbers
