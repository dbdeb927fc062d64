"""TensorBoard's event files, written without PyTorch."""

import io
import os
import re
import socket
import time
import uuid
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from fastvit_engine.files import write_all
from fastvit_engine.observe.metrics import Row
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.observe.trackers.protocol import numbers_of

_EVENT_FILE = re.compile(r"events\.out\.tfevents\.([0-9]{10})\.")


class TensorBoard:
    """An event file in the run folder, with a scalar per number: "train/loss", "eval/top1", "fewshot/5-shot".

    The file is made at the first row, and each row is in it at once. PyTorch's SummaryWriter writes from a thread of
    its own, which prints a traceback when the disk is full.

    start_step: training continues from there. What an earlier file says of later steps is hidden.
    """

    def __init__(self, run: RunFolder, start_step: int) -> None:
        self._folder, self._start_step = run.tensorboard, start_step
        self._file: int | None = None

    def __str__(self) -> str:
        return str(self._folder)

    def write(self, row: Row) -> None:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in numbers_of(row).items()]
        event = Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values))
        if self._file is None:
            self._file = self._open()
        write_all(self._file, _record(event))

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self) -> int:
        self._folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names: the second of this one must come after
        # those of earlier starts, also of one in the same second or on a machine whose clock is ahead.
        earlier = [int(found[1]) for path in self._folder.iterdir() if (found := _EVENT_FILE.match(path.name))]
        second = max([int(time.time()), *(second + 1 for second in earlier)])
        name = f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        file = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        write_all(file, _record(Event(wall_time=time.time(), file_version="brain.Event:2")))
        start = SessionLog(status=SessionLog.START)
        write_all(file, _record(Event(wall_time=time.time(), step=self._start_step + 1, session_log=start)))
        return file


def _record(event: Any) -> bytes:
    content = io.BytesIO()
    RecordWriter(content).write(event.SerializeToString())
    return content.getvalue()
