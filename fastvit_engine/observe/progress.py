"""Progress of long work, training or data: one live line on a terminal, plain lines in a log file, or nothing."""

import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO, cast

from fastvit_engine.observe.metrics import EvalRow, FewShotRow, TrainRow
from fastvit_engine.observe.units import format_duration, format_share
from fastvit_engine.shown import shown, shown_lines

_REDRAW_SECONDS = 0.1
_LINE_SECONDS = 30.0  # between the plain lines of data work
# In the rate an ETA is computed from, work this long ago counts 1/e as much as work now.
_TRAINING_MEMORY_SECONDS = 60.0
_WORK_MEMORY_SECONDS = 30.0
_MAX_BAR = 30  # characters
_MIN_BAR = 8


class Display:
    """A line at the bottom of a terminal that is redrawn in place, below plain lines; elsewhere, plain lines only.

    With `quiet` nothing is written.
    """

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic, *, quiet: bool = False
    ) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.quiet = quiet
        self.live = not quiet and self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self._clock = clock
        self._drawn_at = -math.inf  # as long as nothing is drawn

    @property
    def columns(self) -> int:
        """Characters that fit into the live line; asked each time, since windows change size."""
        return _columns(self.stream) - 1

    @property
    def drawn(self) -> bool:
        """Whether a live line is on the screen."""
        return self._drawn_at > -math.inf

    def may_redraw(self) -> bool:
        """Whether there is a live line, and the last redraw is long enough ago."""
        return self.live and self._clock() - self._drawn_at >= _REDRAW_SECONDS

    def draw(self, text: str) -> None:
        """Shows `text` as the live line, as far as it fits; writes nothing if there is none."""
        if self.live:
            self._write("\r" + shown(text)[: self.columns] + "\x1b[K")
            self._drawn_at = self._clock()

    def print(self, text: str) -> None:
        """Writes a plain line; the live line goes."""
        self.clear()
        if not self.quiet:
            self._write(shown_lines(text) + "\n")

    def clear(self) -> None:
        """Erases the live line, so that other output can follow."""
        if self.drawn:
            self._write("\r\x1b[K")  # to the line's start, erase to its end
            self._drawn_at = -math.inf

    def leave(self) -> None:
        """Keeps the live line as it is, moves below it, and draws no other."""
        if self.drawn:
            self._write("\n")
            self._drawn_at = -math.inf
        self.live = False

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


class Rate:
    """How much is done per second, of late."""

    def __init__(self, memory_seconds: float) -> None:
        self._memory_seconds = memory_seconds
        self._mark: tuple[float, float] | None = None
        self._done = self._seconds = 0.0

    @property
    def started(self) -> bool:
        return self._mark is not None

    def start(self, done: float, now: float) -> None:
        """Measures from here on; the time since the last measurement does not count."""
        self._mark = (done, now)

    def measure(self, done: float, now: float) -> None:
        if self._mark is not None:
            seconds = now - self._mark[1]
            kept = math.exp(-seconds / self._memory_seconds)
            self._done = self._done * kept + done - self._mark[0]
            self._seconds = self._seconds * kept + seconds
        self._mark = (done, now)

    @property
    def per_second(self) -> float | None:
        """None before anything was done."""
        return self._done / self._seconds if self._done > 0 and self._seconds > 0 else None


class WorkProgress:
    """Shows which work on data is in progress, how much of it is done, how fast, and how long the rest will take."""

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic, *, quiet: bool = False
    ) -> None:
        self._display = Display(stream, clock, quiet=quiet)
        self._clock = clock
        self.start("", 0, "")

    def start(self, doing: str, total: int | None, unit: str) -> None:
        """Begins other work: `doing` ("writing"), `total` of `unit` ("images"); None: nobody knows how many."""
        self._doing, self._total, self._unit = doing, total, unit
        self._printed_at = self._clock()
        self._rate = Rate(_WORK_MEMORY_SECONDS)
        self._rate.start(0, self._printed_at)

    def update(self, done: int, note: str = "") -> None:
        """`done` of the total are done; `note` goes to the end of the line."""
        now = self._clock()
        if not self._display.may_redraw() and (self._display.live or now - self._printed_at < _LINE_SECONDS):
            return
        self._rate.measure(done, now)
        line = "  ".join([*self._figures(done), *([note] if note else [])])
        if self._display.live:
            self._display.draw(line)
        else:
            self._display.print(line)
            self._printed_at = now

    def clear(self) -> None:
        """Erases the live line, so that other output can follow."""
        self._display.clear()

    def _figures(self, done: int) -> list[str]:
        percent = f" ({100 * done / self._total:.0f} %)" if self._total else ""
        total = "" if self._total is None else f" of {self._total:,}"
        figures = [f"{self._doing} {done:,}{total} {self._unit}{percent}"]
        rate = self._rate.per_second
        if rate is not None:
            figures.append(f"{rate:,.0f} {self._unit}/s" if rate >= 10 else f"{rate:.2g} {self._unit}/s")
            if self._total is not None:
                figures.append(f"ETA {format_duration(max(0, self._total - done) / rate)}")
        return figures


class TrainingProgress:
    """Shows which step a run has reached, and the figures of its last metrics row.

    Call `advance` after every step (cheap), `log` with each metrics row, `log_evaluation` after an evaluation. On a
    terminal `advance` redraws a live line at most ten times a second; elsewhere only `log` writes, one line per row.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        quiet: bool = False,
    ) -> None:
        self._total_steps = total_steps
        self._display = Display(stream, clock, quiet=quiet)
        self._bar_characters = _bar_characters(self._display.stream)
        self._clock = clock
        self._step = start_step
        self._row: TrainRow | None = None
        # Starts when the first step is done: that one compiles kernels and fills the data pipeline, so its time says
        # nothing about the others.
        self._rate = Rate(_TRAINING_MEMORY_SECONDS)

    def advance(self, step: int) -> None:
        """`step` optimizer steps are done."""
        if step > self._step or not self._rate.started:
            self._rate.measure(step, self._clock())
        self._step = step
        if self._display.may_redraw() or step >= self._total_steps:
            self._draw()

    def log(self, row: TrainRow) -> None:
        """Shows the figures of a metrics row, and advances to its step."""
        self._row = row
        self.advance(row["step"])
        if self._display.live:
            self._draw()
        else:
            self._display.print("  ".join([f"step {self._step}/{self._total_steps}", *self._figures()]))

    def log_evaluation(self, row: EvalRow | FewShotRow) -> None:
        """Prints the result of an evaluation as a line of its own; its time does not count as training time."""
        which = "EMA weights, " if row["eval"].endswith("_ema") else ""
        if "shots" in row:
            few_shot = cast(FewShotRow, row)
            kind = "few-shot accuracy"
            figures = [f"{shots}-shot {format_share(found['mean'])}" for shots, found in few_shot["shots"].items()]
        else:
            one = cast(EvalRow, row)
            kind, figures = "evaluation", [f"top-1 {format_share(one['top1'])}"]
            figures += [] if one["top5"] is None else [f"top-5 {format_share(one['top5'])}"]
            figures.append(f"loss {one['loss']:.4g}")
        self.message(
            f"{kind} ({which}step {row['step']}): {'  '.join(figures)}  "
            f"({row['samples']:,} images in {format_duration(row['seconds'])})"
        )
        self._rate.start(self._step, self._clock())

    def message(self, text: str) -> None:
        """Prints `text` above the live line."""
        self._display.print(text)
        if self._row is not None:
            self._draw()

    def close(self) -> None:
        """Leaves the last live line on the screen and moves below it."""
        if self._display.drawn:
            self._draw()
        self._display.leave()

    @property
    def eta_seconds(self) -> float | None:
        """Seconds of training left at the rate of recent steps, evaluations not included; None before it is known."""
        if self._step >= self._total_steps:
            return 0.0
        rate = self._rate.per_second
        return None if rate is None else (self._total_steps - self._step) / rate

    def _figures(self) -> list[str]:
        """The figures of the last row, the most important first."""
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
            if not self._display.live:
                figures += [f"lr {row['lr']:.3g}"]
                figures += [] if row["epoch"] is None else [f"epoch {row['epoch']:.2f}"]
        return figures

    def _draw(self) -> None:
        self._display.draw(self._line(self._display.columns))

    def _line(self, width: int) -> str:
        """Bar and figures in at most `width` characters: drops the least important figures first, then the bar."""
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


def _bar_characters(stream: TextIO) -> tuple[str, str]:
    try:
        "━─".encode(getattr(stream, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return "#", "-"
    return "━", "─"


def _columns(stream: TextIO) -> int:
    """Width of the terminal behind `stream`."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80  # 0: a terminal that was never told its size
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns
