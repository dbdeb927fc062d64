"""Which checkpoints stay: the newest, one every so often, and the best by an evaluation."""

import math
from collections.abc import Mapping

from fastvit_engine.checkpoint.trainer_state import TrainerState


def stale_checkpoints(
    states: Mapping[str, TrainerState], *, keep: int, keep_every: int | None, best: str | None
) -> list[str]:
    """The names of the checkpoints to remove.

    states: of each complete checkpoint. keep: number of most recent ones to keep. keep_every: the first one at or after
    each multiple of this many steps is kept, too; saves need not fall on multiples. best: "eval.top1" or the like;
    keeps the best by this figure of an evaluation made at the checkpoint's own step.
    """
    by_step = sorted(states, key=lambda name: states[name].step)
    kept = set(by_step[-keep:])
    if keep_every:
        first = {states[name].step // keep_every: name for name in reversed(by_step)}  # of each interval
        kept |= {name for interval, name in first.items() if interval > 0 or states[name].step == 0}
    if best and (scores := {name: score for name in by_step if (score := _score(states[name], best)) is not None}):
        kept.add(max(reversed(by_step), key=lambda name: scores.get(name, float("-inf"))))  # the latest of equals
    return [name for name in by_step if name not in kept]


def _score(state: TrainerState, metric: str) -> float | None:
    """Higher is better; None if this checkpoint was not evaluated, or to nothing that compares (NaN)."""
    evaluation, _, figure = metric.partition(".")
    value = state.accuracy.get(evaluation, {}).get(figure)
    if value is None or math.isnan(value) or state.evaluated_at != state.step:
        return None
    return -value if figure == "loss" else value
