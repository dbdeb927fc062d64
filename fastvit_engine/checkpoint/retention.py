"""Which checkpoints stay: the newest, one every so often, and the best by an evaluation."""

from collections.abc import Mapping
from typing import Any


def stale_checkpoints(
    states: Mapping[str, Mapping[str, Any]], *, keep: int, keep_every: int | None, best: str | None
) -> list[str]:
    """The names of the checkpoints to remove.

    states: what the trainer noted in each complete checkpoint, with its "step".
    keep: newest that stay. keep_every: those of its multiples in steps stay too.
    best: "eval.top1" or the like: so does the best by this figure of an evaluation made at the checkpoint's own step.
    """
    by_step = sorted(states, key=lambda name: states[name]["step"])
    kept = set(by_step[-keep:])
    if keep_every:
        kept |= {name for name in by_step if states[name]["step"] % keep_every == 0}
    if best and (scores := {name: score for name in by_step if (score := _score(states[name], best)) is not None}):
        kept.add(max(reversed(by_step), key=lambda name: scores.get(name, float("-inf"))))  # the latest of equals
    return [name for name in by_step if name not in kept]


def _score(state: Mapping[str, Any], metric: str) -> float | None:
    """Higher is better; None where this checkpoint was not evaluated."""
    evaluation, _, figure = metric.partition(".")
    value = state["accuracy"].get(evaluation, {}).get(figure)
    if value is None or state.get("evaluated_at") != state["step"]:
        return None
    return -value if figure == "loss" else value
