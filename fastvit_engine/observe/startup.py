"""Shows what a run is doing before its first step, and for how long, so that a hang there is seen as one."""

import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from fastvit_engine.observe.progress import Display
from fastvit_engine.observe.units import format_duration

_WORTH_A_LINE_SECONDS = 2.0
_STILL_SECONDS = (10.0, 60.0)  # in a log: until the first line of a phase that takes long, and between further ones
_WATCH_SECONDS = 0.5


class StartUp:
    """A phase after the other, until `done`; shown by rank 0.

    On a terminal one line is replaced; in a log each phase that takes two seconds or more is a line when it ends, and
    one that takes long is a line after ten seconds, and each minute after that.
    """

    def __init__(
        self,
        doing: str,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        quiet: bool | None = None,
    ) -> None:
        """doing: the first phase. quiet: shows nothing; None: unless this process is rank 0."""
        quiet = os.environ.get("RANK", "0") != "0" if quiet is None else quiet
        self._display = Display(stream, clock, quiet=quiet)
        self._clock = clock
        self._doing: str | None = doing
        self._since = clock()
        self._next_line = self._since + _STILL_SECONDS[0]
        self._over = False
        self._lock = threading.Lock()  # between training and the thread that watches it
        self._stop = threading.Event()

    def __enter__(self) -> "StartUp":
        if not self._display.quiet:
            threading.Thread(target=self._watch, name="start-up", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.done()

    def phase(self, doing: str) -> None:
        """Begins another phase; nothing once the start is over."""
        with self._lock:
            if not self._over and doing != self._doing:
                self._end_phase()
                self._doing, self._since = doing, self._clock()
                self._next_line = self._since + _STILL_SECONDS[0]

    def pause(self) -> None:
        """Ends the phase, so that other lines can follow."""
        with self._lock:
            self._end_phase()

    def done(self) -> None:
        """The first step is done, or the run has ended before it. May be called again."""
        if not self._over:
            with self._lock:
                self._end_phase()
                self._over = True
            self._stop.set()

    def show(self) -> None:
        """Shows the current phase, if it is time to."""
        with self._lock:
            if self._doing is None:
                return
            now = self._clock()
            seconds = now - self._since
            if self._display.live and seconds >= _WORTH_A_LINE_SECONDS:
                self._display.draw(f"{self._doing}  {format_duration(seconds)}")
            elif not self._display.live and now >= self._next_line:
                self._display.print(f"{self._doing}: {format_duration(seconds)} so far")
                self._next_line = now + _STILL_SECONDS[1]

    def _end_phase(self) -> None:
        self._display.clear()
        if self._doing is None:
            return
        seconds = self._clock() - self._since
        if seconds >= _WORTH_A_LINE_SECONDS and not self._display.live:
            self._display.print(f"{self._doing}: {format_duration(seconds)}")
        self._doing = None

    def _watch(self) -> None:
        while not self._stop.wait(_WATCH_SECONDS):
            self.show()
