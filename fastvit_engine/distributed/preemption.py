r"""Preemption: after SIGTERM, SIGUSR1, SIGHUP or Ctrl-C a run finishes its step, saves, and ends with exit code 76.

Any process of the run may receive the signal; the report of each step tells the others. A second signal, two seconds
later or more, ends the process at once: the latest checkpoint stays. SIGQUIT, which Ctrl-\ sends and no scheduler
uses, asks for stack traces, as it does in Java and Go.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from threading import Thread
from types import TracebackType
from typing import Any

from fastvit_engine.distributed.supervise import REQUESTS, SAME_REQUEST_SECONDS, not_ignored, silence, terminals


class Preemption:
    """Listens to signals while it is entered.

    On a thread: the main thread may be deep inside a collective operation, where Python would not call a handler.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None  # the first that asked this process to leave
        self.on_stack_request: Callable[[], None] | None = None

    def __enter__(self) -> "Preemption":
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._terminals = terminals()
        self._handlers_before = {
            number: signal.signal(number, _leave_to_the_thread) for number in not_ignored((*REQUESTS, signal.SIGQUIT))
        }
        # Written to by the C code that receives a signal, whatever the main thread is doing.
        self._descriptor_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._pipe = (reader, writer)
        Thread(target=self._listen, args=[reader], name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._descriptor_before)
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        os.close(self._pipe[1])  # which ends the thread

    def _listen(self, reader: int) -> None:
        asked_at = 0.0
        while received := os.read(reader, 64):
            for number in received:
                if number == signal.SIGQUIT and self.on_stack_request:
                    self.on_stack_request()
                if number not in REQUESTS:
                    continue
                if number == signal.SIGHUP:
                    silence(self._terminals)
                if self.signal is None:
                    self.signal, asked_at = signal.Signals(number), time.monotonic()
                    if os.environ.get("RANK") == "0":
                        print(
                            f"fastvit: {self.signal.name}: finishing the step and saving; once more to leave at once",
                            file=sys.stderr,
                            flush=True,
                        )
                elif time.monotonic() - asked_at > SAME_REQUEST_SECONDS:
                    os._exit(128 + number)
        os.close(reader)


def _leave_to_the_thread(number: int, frame: Any) -> None:
    """Python needs a handler, or the signal would end the process."""
