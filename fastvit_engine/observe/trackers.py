"""Where the figures of a run go besides `metrics.jsonl`: programs that draw them while it trains.

This module imports TensorBoard; only a process that writes figures needs it.
"""

from typing import Protocol

from torch.utils.tensorboard import SummaryWriter

from fastvit_engine.observe.metrics import EvalRow, TrainRow
from fastvit_engine.observe.run_folder import RunFolder


class Tracker(Protocol):
    """Takes every row that `metrics.jsonl` gets, in the same order. One process of a job has trackers."""

    def write(self, row: TrainRow | EvalRow) -> None:
        """Takes the numbers of one row."""

    def close(self) -> None:
        """Writes out what it still holds."""


class TensorBoard:
    """Event files in the run folder, with a scalar per number: "train/loss", "eval/top1".

    start_step: training continues from there. What an earlier file says of later steps is hidden.
    """

    def __init__(self, run: RunFolder, start_step: int) -> None:
        self._events = SummaryWriter(str(run.tensorboard), purge_step=start_step + 1, flush_secs=15)

    def write(self, row: TrainRow | EvalRow) -> None:
        group = row.get("eval", "train")
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                self._events.add_scalar(f"{group}/{key}", value, row["step"])

    def close(self) -> None:
        self._events.close()
