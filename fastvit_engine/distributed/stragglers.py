"""Finds ranks that are slower than the others, by the part of a step in which no rank waits for another.

That is waiting for its own data and the forward pass; the backward pass already exchanges gradients. Under ZeRO-3 the
forward pass gathers parameters from all ranks, so that only the wait for data can tell them apart.
"""

import statistics
from collections.abc import Sequence

from fastvit_engine.config import WatchdogConfig
from fastvit_engine.distributed.world import World
from fastvit_engine.observe.events import record_event
from fastvit_engine.observe.recorder import Recorder
from fastvit_engine.observe.run_folder import RunFolder

_INTERVAL_SECONDS = 5.0  # of a measurement, at least: over a few milliseconds, some rank is slower by chance
_LEAST_COST = 0.05  # fraction of an interval that a slow rank must cost the others to be named
_REPEAT = 10  # times `slow_rank_laps` intervals, until a rank that stays slow is named again


class Stragglers:
    """Measures this rank's own work and names the slow ranks, at log steps.

    A rank is measured over intervals of five seconds or more, from one log step to another; `slow_rank_laps` counts
    them. The time before the first log step is left out: data workers start and kernels are compiled.
    """

    def __init__(
        self,
        run: RunFolder,
        world: World,
        config: WatchdogConfig,
        hosts: Sequence[str],
        *,
        zero_stage: int,
        images: Sequence[int] = (),
    ) -> None:
        """`images`: that each rank computes with in a step, at least one, if they differ."""
        self.run, self.world, self.config = run, world, config
        self.hosts = hosts  # of each rank
        self.measures_forward = zero_stage < 3
        # How much longer than the fastest a rank may take because it has more to do.
        self._allowance = [number / min(images) for number in images] or [1.0] * world.size
        self._started = False
        self._interval_seconds = 0.0
        self._work = [0.0] * world.size  # seconds of each rank's own work in this interval
        self._streaks = [0] * world.size  # consecutive intervals in which each rank was slow
        self.work_shares: list[float] = []  # of each rank: its own work in the last interval between log steps

    def log_step(self, waited: float, forward: float, seconds: float, step: int, recorder: Recorder | None) -> None:
        """Adds the time since the last log step, and names slow ranks; collective.

        seconds: since that step. waited, forward: what of them this rank has waited for data, and spent on forward
        passes.
        """
        if self.world.size == 1:
            return
        own = waited + (forward if self.measures_forward else 0.0)
        work = self.world.sum([own if rank == self.world.rank else 0.0 for rank in range(self.world.size)]).tolist()
        self.work_shares = [own / seconds for own in work]
        for rank, ratio in self._slow_ranks(work, seconds):
            part = "data and forward pass" if self.measures_forward else "data"
            message = (
                f"rank {rank} on {self.hosts[rank]} is slow: its {part} took {ratio:.1f} times as long as the median "
                "rank's"
            )
            if recorder:
                recorder.message(message)
                record_event(self.run, "slow_rank", message, ranks=[rank], ratio=round(ratio, 2), step=step)

    def _slow_ranks(self, work: Sequence[float], seconds: float) -> list[tuple[int, float]]:
        """Returns (rank, ratio to the median) of the ranks to name now, from the seconds of work of each rank."""
        if not self._started:
            self._started = True
            return []
        self._work = [before + now for before, now in zip(self._work, work, strict=True)]
        self._interval_seconds += seconds
        if self._interval_seconds < _INTERVAL_SECONDS:
            return []
        median = statistics.median_low(self._work)  # low: of two ranks, the faster one is the measure
        named = []
        for rank, own in enumerate(self._work):
            usual = median * self._allowance[rank]
            slow = own > self.config.slow_rank_ratio * usual and own - usual > _LEAST_COST * self._interval_seconds
            self._streaks[rank] = self._streaks[rank] + 1 if slow else 0
            if self._streaks[rank] % (_REPEAT * self.config.slow_rank_laps) == self.config.slow_rank_laps:
                named.append((rank, own / max(median, 1e-9)))
        self._work, self._interval_seconds = [0.0] * self.world.size, 0.0
        return named
