"""Trackio, on this machine or where its own variables say. Runs in `child` only."""

import trackio

from fastvit_engine.observe.trackers.child import TrackedRun


class _Run:
    def __init__(self, run: TrackedRun) -> None:
        # Trackio knows runs by their names, and those of two folders may be the same.
        name = f"{run.name}-{run.id[:6]}"
        self._run = trackio.init(run.project, name, config=run.config, resume="allow", embed=False)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self, *, finished: bool) -> None:
        self._run.finish()


def open_run(run: TrackedRun) -> _Run:
    return _Run(run)
