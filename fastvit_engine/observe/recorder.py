"""Writes and shows the progress of a run, in one of its processes (rank 0)."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fastvit_engine.observe.metrics import EvalRow, MetricsWriter, TrainRow
from fastvit_engine.observe.progress import TrainingProgress
from fastvit_engine.observe.run_folder import RunFolder

if TYPE_CHECKING:  # which imports what the trackers are made of
    from fastvit_engine.observe.trackers import Tracker


class Recorder:
    """Sends each row to `metrics.jsonl`, to the trackers and to the progress display.

    check_owner: raises UserError if this run must not write any more; called before each row.
    """

    def __init__(
        self,
        run: RunFolder,
        total_steps: int,
        start_step: int,
        trackers: "Sequence[Tracker]" = (),
        check_owner: Callable[[], None] = lambda: None,
    ) -> None:
        self._check_owner = check_owner
        self._metrics = MetricsWriter(run, resume_step=start_step)
        self._trackers = trackers
        self._progress = TrainingProgress(total_steps, start_step)

    def advance(self, step: int) -> None:
        self._progress.advance(step)

    def training(self, row: TrainRow) -> None:
        self._write(row)
        self._progress.log(row)

    def evaluation(self, row: EvalRow) -> None:
        self._write(row)
        self._progress.log_evaluation(row)

    def message(self, text: str) -> None:
        self._progress.message(text)

    def close(self) -> None:
        self._progress.close()
        for tracker in self._trackers:
            tracker.close()

    def _write(self, row: TrainRow | EvalRow) -> None:
        self._check_owner()
        self._metrics.write(row)
        for tracker in self._trackers:
            tracker.write(row)
