"""Which ranks are at fault when a job hangs: one sentence, from the last status of each rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_MOST_NAMED = 4  # ranks in a sentence


@dataclass(frozen=True)
class RankStatus:
    """What a rank is doing, as its heartbeat says."""

    rank: int
    host: str
    step: int | None = None  # optimizer steps done; None before training
    phase: str = "starting"
    marks: int = 0  # signs of progress since that step; all ranks do the same in the same order: fewer is behind
    slow: bool = True  # in a phase that may take `watchdog.slow_phase_seconds`
    seconds: float = 0.0  # in this phase, at the heartbeat
    beat: int = 0  # number of the heartbeat

    @property
    def position(self) -> tuple[int, int]:
        return (-1 if self.step is None else self.step, self.marks)

    @property
    def activity(self) -> str:
        return f"'{self.phase}'" if self.step is None else f"'{self.phase}' after step {self.step}"

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def describe_hang(statuses: Sequence[RankStatus], silent: Mapping[int, float], seconds: float) -> tuple[str, list[int]]:
    """Says why there has been no progress for `seconds`, and names the ranks at fault.

    Those are the ranks that are `silent` (rank to seconds since its last heartbeat), else the ones that are behind.
    If all are alive and equally far, no rank is at fault.
    """
    start = f"no process has made progress for {seconds:.0f} s: "
    missing = [status for status in statuses if status.rank in silent]
    if missing:
        texts = [f"{rank} was last heard of {silent[rank.rank]:.0f} s ago, in {rank.activity}" for rank in missing]
        return start + name_some(texts), [rank.rank for rank in missing]
    furthest = max(statuses, key=lambda status: status.position)
    late = [status for status in statuses if status.position < furthest.position]
    if late:
        texts = [f"{rank} is late, in {rank.activity} for {rank.seconds:.0f} s" for rank in late]
        return f"{start}{name_some(texts)}, while {furthest} is in {furthest.activity}", [rank.rank for rank in late]
    return f"{start}all ranks are alive in {furthest.activity}, so the network or a device has failed them", []


def describe_loss(lost: Sequence[RankStatus], cause: str) -> str:
    """Says why a collective operation failed with `cause`, when the ranks `lost` have fallen silent."""
    if not lost:
        return f"a collective operation failed though every rank is alive: {cause}"
    return f"{name_some([f'{status} is gone, last heard of in {status.activity}' for status in lost])}: {cause}"


def name_some(texts: Sequence[str]) -> str:
    more = len(texts) - _MOST_NAMED
    return "; ".join(texts[:_MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
