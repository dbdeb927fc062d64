"""Weights & Biases; its own variables, such as WANDB_MODE=offline, say where a run goes. Runs in `child` only."""

import os

import wandb

from fastvit_engine.observe.trackers.child import TrackedRun


class _Run:
    """The steps are a metric of their own: W&B leaves out rows whose own count of them goes back, as after a rewind."""

    def __init__(self, run: TrackedRun) -> None:
        settings = wandb.Settings(
            console="off", disable_git=True, disable_code=True, silent=True, x_stats_pid=os.getppid()
        )
        self._run = wandb.init(
            id=run.id,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", run.project),
            name=run.name,
            dir=os.environ.get("WANDB_DIR", run.folder),
            settings=settings,
        )
        self._run.config.update(run.config, allow_val_change=True)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


def open_run(run: TrackedRun) -> _Run:
    return _Run(run)
