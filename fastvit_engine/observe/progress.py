"""Progress of a training run: one live line on a terminal, plain lines in a log file."""

import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

from fastvit_engine.observe.metrics import EvalRow, TrainRow
from fastvit_engine.observe.units import format_duration, format_share

_REDRAW_SECONDS = 0.1
_RATE_MEMORY_SECONDS = 60.0  # steps of longer ago count less than 1/e in the rate the ETA is made of
_MAX_BAR = 30  # characters
_MIN_BAR = 8


class Progress:
    """Shows where a run is.

    Call `advance` after every step (cheap), `log` with each metrics row, `log_evaluation` after an evaluation. On a
    terminal `advance` redraws a live line at most ten times a second; elsewhere only `log` writes, one line a row.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._bar_characters = _bar_characters(self._stream)
        self._clock = clock
        self._step = start_step
        self._row: TrainRow | None = None
        self._drawn_at = -math.inf
        # The step and time that the next one is measured from. Unset until the first step is done: it compiles kernels
        # and fills the data pipeline, so its time says nothing about the rest.
        self._mark: tuple[int, float] | None = None
        self._recent_steps = 0.0
        self._recent_seconds = 0.0

    def advance(self, step: int) -> None:
        """`step` optimizer steps are done."""
        now = self._clock()
        if step > self._step or self._mark is None:
            self._measure(step, now)
        self._step = step
        if self._live and (now - self._drawn_at >= _REDRAW_SECONDS or step >= self._total_steps):
            self._draw()

    def log(self, row: TrainRow) -> None:
        """Shows the figures of a metrics row, and advances to its step."""
        self._row = row
        self.advance(row["step"])
        if self._live:
            self._draw()
        else:
            self._write_line("  ".join([f"step {self._step}/{self._total_steps}", *self._figures()]))

    def log_evaluation(self, row: EvalRow) -> None:
        """Prints the result of an evaluation as a line of its own; its time does not count as training time."""
        which = "EMA weights, " if row["eval"] == "eval_ema" else ""
        top5 = "" if row["top5"] is None else f"top-5 {format_share(row['top5'])}  "
        self.message(
            f"evaluation ({which}step {row['step']}): top-1 {format_share(row['top1'])}  {top5}loss {row['loss']:.4g}  "
            f"({row['samples']:,} images in {format_duration(row['seconds'])})"
        )
        self._mark = (self._step, self._clock())

    def message(self, text: str) -> None:
        """Prints `text` above the live line."""
        if self._live:
            self._stream.write("\r\x1b[K")  # to the line's start, erase to its end
        self._write_line(text)
        if self._live and self._row is not None:
            self._draw()

    def close(self) -> None:
        """Leaves the live line standing and moves below it."""
        if self._live and self._drawn_at > -math.inf:
            self._draw()
            self._write_line("")
            self._live = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def eta_seconds(self) -> float | None:
        """Seconds of training left at the rate of recent steps, evaluations not included; None before it is known."""
        if self._step >= self._total_steps:
            return 0.0
        if self._recent_steps == 0:
            return None
        return (self._total_steps - self._step) * self._recent_seconds / self._recent_steps

    def _measure(self, step: int, now: float) -> None:
        if self._mark is not None:
            steps, seconds = step - self._mark[0], now - self._mark[1]
            kept = math.exp(-seconds / _RATE_MEMORY_SECONDS)
            self._recent_steps = self._recent_steps * kept + steps
            self._recent_seconds = self._recent_seconds * kept + seconds
        self._mark = (step, now)

    def _figures(self) -> list[str]:
        """What is said of the last row, the most important first."""
        row, figures = self._row, []
        if row is not None:
            figures.append(f"loss {row['loss']:.4f}")
        if self.eta_seconds is not None and self._step < self._total_steps:
            figures.append(f"ETA {format_duration(self.eta_seconds)}")
        if row is not None:
            figures.append(f"{row['images_per_second']:,.0f} images/s")
            if row["mfu"] is not None:
                figures.append(f"MFU {format_share(row['mfu'])}")
            figures.append(f"data wait {format_share(row['data_wait'])}")
            if not self._live:
                figures += [f"lr {row['lr']:.3g}"]
                figures += [] if row["epoch"] is None else [f"epoch {row['epoch']:.2f}"]
        return figures

    def _draw(self) -> None:
        self._stream.write("\r" + self._line(_columns(self._stream) - 1) + "\x1b[K")
        self._stream.flush()
        self._drawn_at = self._clock()

    def _line(self, width: int) -> str:
        """Bar and figures in at most `width` characters: the least important figures go first, then the bar."""
        parts = [f"{self._step}/{self._total_steps}"]
        for figure in self._figures():
            if len("  ".join([*parts, figure])) > width - _MIN_BAR - 1:
                break
            parts.append(figure)
        text = "  ".join(parts)
        room = width - len(text) - 1
        return f"{self._bar(min(room, _MAX_BAR))} {text}" if room >= _MIN_BAR else text[:width]

    def _bar(self, width: int) -> str:
        done, left = self._bar_characters
        filled = width * self._step // max(1, self._total_steps)
        return done * filled + left * (width - filled)

    def _write_line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


def _bar_characters(stream: TextIO) -> tuple[str, str]:
    try:
        "━─".encode(getattr(stream, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return "#", "-"
    return "━", "─"


def _columns(stream: TextIO) -> int:
    """Width of the terminal behind `stream`; asked each time, since windows change size."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80  # 0: a terminal that was never told its size
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns
