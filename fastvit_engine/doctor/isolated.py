"""Runs a check in a process of its own, which may hang, crash or break its libraries without ending the report.

The process is forked, so nothing may have initialised CUDA before. A timer of the kernel ends it if this process is
gone, or cannot.
"""

import faulthandler
import io
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvit_engine.errors import RestartError, UserError
from fastvit_engine.observe.units import format_duration
from fastvit_engine.shown import shown

Send = Callable[[Any], None]  # of one message, which JSON can hold
_BLOCK = 1 << 16  # bytes
_LATE = 1.0  # seconds after the limit for which what lies in the pipe is read: this process may have had no core
_SPARE = 5.0  # seconds after the limit at which the kernel ends a process that is left over
_LONGEST_REASON = 300  # characters


@dataclass(frozen=True)
class Outcome:
    """What a check has sent, and how it ended."""

    messages: list[Any]
    failure: str | None  # a clause: "it did not end within 30 s"; None if it ended well
    timely: bool = True  # whether it ended before its time limit
    busy: bool = False  # whether it was computing at its time limit, and not waiting for anything


class Isolated:
    """`check(send)`, started in a process of its own."""

    def __init__(self, check: Callable[[Send], None], seconds: float) -> None:
        self._deadline, self._seconds = time.monotonic() + seconds, seconds
        self._said = os.memfd_create("fastvit-doctor")  # not a file: a full disk is one of the things to find
        self._pipe, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self._process = os.fork()
        if self._process == 0:
            _run(check, writing, self._said, seconds + _SPARE)
        os.close(writing)
        self._ended = False

    def wait(self) -> Outcome:
        """Returns when the check has ended, or at its time limit; nothing of it is left running."""
        content, timely = self._read()
        busy = not timely and _computes(self._process)
        status = self._end()
        messages = [json.loads(line) for line in content.split(b"\n")[:-1]]  # behind the last newline: half a line
        if not timely:
            return Outcome(messages, f"it did not end within {format_duration(self._seconds)}", timely=False, busy=busy)
        if os.WIFSIGNALED(status):
            reason = f"it was killed by {signal.Signals(os.WTERMSIG(status)).name}"
        elif os.WEXITSTATUS(status):
            reason = "it failed"
        else:
            return Outcome(messages, None)
        last = self._last_words()
        return Outcome(messages, f"{reason}: {last}" if last else reason)

    def stop(self) -> None:
        """Ends the check."""
        self._end()

    def _read(self) -> tuple[bytes, bool]:
        """All that was sent, and whether the check ended in time."""
        content = bytearray()
        while (left := self._deadline - time.monotonic()) > -_LATE:
            if not select.select([self._pipe], [], [], max(0.0, left))[0]:
                break
            block = os.read(self._pipe, _BLOCK)
            if not block:
                return bytes(content), True
            content += block
        return bytes(content), False

    def _end(self) -> int:
        """Kills the process, with what it has started, if it still runs; returns how it ended."""
        if self._ended:
            return 0
        self._ended = True
        os.close(self._pipe)
        grace = time.monotonic() + 1  # of a process that has closed its pipe and is about to exit
        while time.monotonic() < min(grace, self._deadline):
            process, status = os.waitpid(self._process, os.WNOHANG)
            if process:
                self._kill_group()
                return status
            time.sleep(0.002)
        self._kill_group()
        os.kill(self._process, signal.SIGKILL)  # which may not have made its group yet
        # A process in an uninterruptible call, of a dead network disk, is not waited for.
        for _ in range(100):
            process, status = os.waitpid(self._process, os.WNOHANG)
            if process:
                return status
            time.sleep(0.01)
        return 0

    def _kill_group(self) -> None:
        """Kills what the check has started, and the check."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process, signal.SIGKILL)

    def _last_words(self) -> str:
        """The last line that the check has printed."""
        size = os.fstat(self._said).st_size
        text = os.pread(self._said, 4096, max(0, size - 4096)).decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return shown(lines[-1])[:_LONGEST_REASON] if lines else ""

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            os.close(self._said)


def _computes(process: int) -> bool:
    """Whether a process runs, or would if a core were free; one in a driver's call or at a dead disk sleeps."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "R"
    except OSError:
        return False


def run_isolated(check: Callable[[Send], None], seconds: float) -> Outcome:
    """The outcome of `check(send)`, at the latest after `seconds`."""
    with stopping([Isolated(check, seconds)]) as (one,):
        return one.wait()


@contextmanager
def stopping(checks: Sequence[Isolated]) -> Iterator[Sequence[Isolated]]:
    """Ends the checks when the block does, however it does."""
    try:
        yield checks
    finally:
        for check in checks:
            check.stop()


def _run(check: Callable[[Send], None], pipe: int, said: int, seconds: float) -> None:
    """The life of the process."""
    code = 1
    try:
        os.setpgid(0, 0)
        for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for ours, theirs in ((nothing, 0), (said, 1), (said, 2)):
            os.dup2(ours, theirs)
        sys.stdout = sys.stderr = io.TextIOWrapper(
            io.FileIO(2, "w", closefd=False), errors="replace", write_through=True
        )
        faulthandler.disable()  # whose dump of a crash would be the last words

        def send(message: Any) -> None:
            left = memoryview(json.dumps(message).encode() + b"\n")
            while left:
                left = left[os.write(pipe, left) :]

        check(send)
        code = 0
    except (UserError, RestartError) as error:
        _say(str(error))
    except BaseException as error:  # a missing package, a broken library, a bug: what it was is the finding
        _say(f"{type(error).__name__}: {' '.join(str(error).split())}")
    finally:
        os._exit(code)


def _say(line: str) -> None:
    with suppress(OSError):
        os.write(2, f"\n{line}\n".encode(errors="replace"))
