"""A tracker whose library runs in a process of its own, so that nothing it does can stop or slow training.

Such libraries talk to servers, start threads, take over stdout and wait at exit. The process gets rows through a queue
and a pipe. If it fails, does not start in time or falls far behind, it is dropped; at the end it has a few seconds.
"""

import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

from fastvit_engine.files import write_all
from fastvit_engine.observe.disk import reason
from fastvit_engine.observe.metrics import Row
from fastvit_engine.observe.trackers.child import OPEN, TrackedRun
from fastvit_engine.observe.trackers.protocol import numbers_of

START_SECONDS = 180.0  # to import the library, to reach its server and to open the run
CLOSE_SECONDS = 15.0  # to send what is left; schedulers kill a stopped job after 30 seconds
_MOST_WAITING = 1000  # rows
# Unless the user says otherwise, no tracker reports its use to its makers.
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


class TrackerProcess:
    """Hands the rows of a run to a library. module: that which has `open_run` for it, see `child.OpenRun`.

    A thread feeds the process: no call waits for it but `close`, and that for `CLOSE_SECONDS` at most.
    """

    def __init__(self, module: str, run: TrackedRun) -> None:
        self._library = module.rpartition(".")[2]
        self._rows: queue.Queue[str | None] = queue.Queue(_MOST_WAITING)
        self._problem: str | None = None
        self._process = _start(module)
        self._feeder = threading.Thread(target=self._feed, args=(json.dumps(run._asdict()),), daemon=True)
        self._feeder.start()

    def __str__(self) -> str:
        return f"the run in {self._library}"

    def write(self, row: Row) -> None:
        if self._problem is None:
            try:
                self._rows.put_nowait(json.dumps({"step": row["step"], "numbers": numbers_of(row)}))
                return
            except queue.Full:
                self._problem = f"it is {_MOST_WAITING:,} rows behind"
        self._kill()
        raise OSError(self._problem)

    def close(self) -> None:
        """Raises OSError if not everything could be sent in time."""
        deadline = time.monotonic() + CLOSE_SECONDS
        try:
            self._rows.put(None, timeout=CLOSE_SECONDS)
            code = self._process.wait(max(0.1, deadline - time.monotonic()))
        except (queue.Full, subprocess.TimeoutExpired):
            self._kill()
            raise OSError(f"it had not sent everything after {CLOSE_SECONDS:.0f} s") from None
        self._feeder.join()
        if self._problem is not None or code != 0:
            raise OSError(self._problem or f"it ended with code {code}")

    def _feed(self, run: str) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            with self._process.stdin as pipe, self._process.stdout as answers:
                self._send(pipe, run)
                self._wait_until_open(answers)
                while (line := self._rows.get()) is not None:
                    self._send(pipe, line)
                self._send(pipe, "null")
                if answer := answers.readline():  # or the end, once the process has ended
                    raise OSError(self._said(answer))
        except OSError as error:
            self._problem = reason(error)

    def _send(self, pipe: IO[bytes], line: str) -> None:
        try:
            write_all(pipe.fileno(), f"{line}\n".encode())
        except BrokenPipeError:
            raise OSError(self._last_words()) from None

    def _wait_until_open(self, answers: IO[bytes]) -> None:
        """Waits until the library has opened the run. Raises OSError if it does not."""
        if not select.select([answers], [], [], START_SECONDS)[0]:
            self._kill()
            raise OSError(f"it did not open the run within {START_SECONDS:.0f} s")
        if (answer := answers.readline()) != OPEN:
            raise OSError(self._said(answer))

    def _last_words(self) -> str:
        """What the process said before it ended."""
        assert self._process.stdout is not None
        return self._said(self._process.stdout.readline())

    def _said(self, line: bytes) -> str:
        return line.decode(errors="replace").strip() or f"its process ended with code {self._process.wait()}"

    def _kill(self) -> None:
        if self._process.poll() is None:  # else its number may be another's by now
            os.killpg(self._process.pid, signal.SIGKILL)  # the library's own processes, too
            self._process.wait()


def _start(module: str) -> "subprocess.Popen[bytes]":
    root = Path(__file__).resolve().parents[3]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "fastvit_engine.observe.trackers.child", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        env={**_QUIET, **os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,  # Ctrl-C is for training, which closes its trackers in order
    )
