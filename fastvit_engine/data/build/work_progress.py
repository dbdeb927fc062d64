"""Progress of work on many images: one live line on a terminal, plain lines now and then in a log file."""

import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

from fastvit_engine.observe.units import format_duration

_REDRAW_SECONDS = 0.2
_LINE_SECONDS = 30.0  # between the plain lines where there is no terminal
_RATE_MEMORY_SECONDS = 30.0  # what happened longer ago counts less than 1/e in the rate the ETA is made of


class WorkProgress:
    """Shows what is being done, how much of it, how fast, and how long it will take."""

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic, *, quiet: bool = False
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._clock = clock
        self._quiet = quiet
        self.start("", 0, "")

    def start(self, doing: str, total: int, unit: str) -> None:
        """A new piece of work: `doing` ("writing"), `total` of `unit` ("images")."""
        self._doing, self._total, self._unit = doing, total, unit
        self._mark: tuple[int, float] = (0, self._clock())
        self._shown_at = self._mark[1] if not self._live else -math.inf
        self._recent_done = self._recent_seconds = 0.0

    def update(self, done: int, note: str = "") -> None:
        """`done` of the total are done; `note` goes to the end of the line."""
        if self._quiet:
            return
        now = self._clock()
        if now - self._shown_at < (_REDRAW_SECONDS if self._live else _LINE_SECONDS):
            return
        self._measure(done, now)
        self._shown_at = now
        line = "  ".join([*self._figures(done), *([note] if note else [])])
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r" + line[:width] + "\x1b[K")
            self._stream.flush()
        else:
            self._stream.write(line + "\n")
            self._stream.flush()

    def clear(self) -> None:
        """Takes the live line away, so that other output can follow."""
        if self._live and self._shown_at > -math.inf and not self._quiet:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._shown_at = -math.inf

    def _measure(self, done: int, now: float) -> None:
        kept = math.exp(-(now - self._mark[1]) / _RATE_MEMORY_SECONDS)
        self._recent_done = self._recent_done * kept + done - self._mark[0]
        self._recent_seconds = self._recent_seconds * kept + now - self._mark[1]
        self._mark = (done, now)

    def _figures(self, done: int) -> list[str]:
        share = f" ({100 * done / self._total:.0f} %)" if self._total else ""
        figures = [f"{self._doing} {done:,} of {self._total:,} {self._unit}{share}"]
        if self._recent_done > 0 and self._recent_seconds > 0:
            rate = self._recent_done / self._recent_seconds
            figures.append(f"{rate:,.0f} {self._unit}/s" if rate >= 10 else f"{rate:.2g} {self._unit}/s")
            figures.append(f"ETA {format_duration((self._total - done) / rate)}")
        return figures
