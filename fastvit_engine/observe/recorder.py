"""Writes and shows the progress of a run, in one of its processes (rank 0)."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

from fastvit_engine.observe.disk import if_possible, insist
from fastvit_engine.observe.events import listening, read_events
from fastvit_engine.observe.metrics import EvaluationRow, MetricsWriter, Row, TrainRow
from fastvit_engine.observe.progress import TrainingProgress
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.observe.trackers.protocol import Tracker


class Recorder:
    """Sends each row to `metrics.jsonl`, to the trackers and to the progress display.

    check_owner: raises UserError if this run must not write any more; called before each row.
    """

    def __init__(
        self,
        run: RunFolder,
        total_steps: int,
        start_step: int,
        trackers: Sequence[Tracker] = (),
        check_owner: Callable[[], None] = lambda: None,
    ) -> None:
        self._check_owner = check_owner
        self._path = run.metrics
        self._metrics = insist(lambda: self._open(run, start_step), str(run.metrics))
        self._trackers = list(trackers)
        self._progress = TrainingProgress(total_steps, start_step)
        for event in read_events(run) if self._progress.live else ():
            self._progress.event(event)
        self._listening = ExitStack()
        self._listening.enter_context(listening(self._progress.event))

    def advance(self, step: int) -> None:
        self._progress.advance(step)

    def training(self, row: TrainRow) -> None:
        self._write(row)
        self._progress.log(row)

    def evaluation(self, row: EvaluationRow) -> None:
        self._write(row)
        self._progress.log_evaluation(row)

    def message(self, text: str) -> None:
        self._progress.message(text)

    def close(self) -> None:
        self._listening.close()
        self._progress.close()
        trackers, self._trackers = self._trackers, []
        for tracker in trackers:
            if_possible(tracker.close, str(tracker))

    def _write(self, row: Row) -> None:
        insist(lambda: self._append(row), str(self._path))
        # One that has failed gets no more rows: part of its last one may be in the file.
        self._trackers = [t for t in self._trackers if if_possible(partial(t.write, row), str(t))]

    def _open(self, run: RunFolder, start_step: int) -> MetricsWriter:
        self._check_owner()
        return MetricsWriter(run, resume_step=start_step)

    def _append(self, row: Row) -> None:
        self._check_owner()
        self._metrics.write(row)
