"""Who is to blame when nothing moves: a sentence from what each rank last said of itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_MOST_NAMED = 4  # ranks in a sentence


@dataclass(frozen=True)
class Stand:
    """Where a rank stands in the run, as its heartbeat says."""

    rank: int
    host: str
    step: int | None = None  # optimizer steps done; None before training
    phase: str = "starting"
    marks: int = 0  # of progress since that step; all ranks do the same in the same order, so fewer is behind
    slow: bool = True  # in a phase that may take `watchdog.slow_phase_seconds`
    seconds: float = 0.0  # in this phase, at the heartbeat
    beat: int = 0  # number of the heartbeat

    @property
    def position(self) -> tuple[int, int]:
        return (-1 if self.step is None else self.step, self.marks)

    @property
    def place(self) -> str:
        return f"'{self.phase}'" if self.step is None else f"'{self.phase}' after step {self.step}"

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def describe_hang(stands: Sequence[Stand], silent: Mapping[int, float], seconds: float) -> tuple[str, list[int]]:
    """Why there has been no progress for `seconds`, and the ranks at fault.

    Those are the ranks that are `silent` (rank to seconds since its last heartbeat), else the ones that are behind.
    Where all are alive and equally far, no rank is at fault.
    """
    start = f"no process has made progress for {seconds:.0f} s: "
    missing = [stand for stand in stands if stand.rank in silent]
    if missing:
        texts = [f"{stand} was last heard of {silent[stand.rank]:.0f} s ago, in {stand.place}" for stand in missing]
        return start + name_some(texts), [stand.rank for stand in missing]
    furthest = max(stands, key=lambda stand: stand.position)
    late = [stand for stand in stands if stand.position < furthest.position]
    if late:
        texts = [f"{stand} is late, in {stand.place} for {stand.seconds:.0f} s" for stand in late]
        return f"{start}{name_some(texts)}, while {furthest} is in {furthest.place}", [stand.rank for stand in late]
    return f"{start}all ranks are alive in {furthest.place}, so the network or a device has failed them", []


def describe_loss(lost: Sequence[Stand], cause: str) -> str:
    """Why a collective operation failed with `cause`, when the ranks `lost` have fallen silent."""
    if not lost:
        return f"a collective operation failed though every rank is alive: {cause}"
    return f"{name_some([f'{stand} is gone, last heard of in {stand.place}' for stand in lost])}: {cause}"


def name_some(texts: Sequence[str]) -> str:
    more = len(texts) - _MOST_NAMED
    return "; ".join(texts[:_MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
