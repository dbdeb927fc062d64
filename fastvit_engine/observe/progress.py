"""Progress of long work, training or data: live lines on a terminal, plain lines in a log file, or nothing."""

import math
import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable
from typing import TextIO, cast

from fastvit_engine.observe.events import Event
from fastvit_engine.observe.live_view import LiveView, Position
from fastvit_engine.observe.metrics import EvalRow, EvaluationRow, FewShotRow, LossRow, OwnRow, TrainRow
from fastvit_engine.observe.units import format_duration, format_share
from fastvit_engine.shown import before_saying, shown, shown_lines

_REDRAW_SECONDS = 0.1
_LINE_SECONDS = 30.0  # between the plain lines of data work
# In the rate an ETA is computed from, work this long ago counts 1/e as much as work now.
_TRAINING_MEMORY_SECONDS = 60.0
_WORK_MEMORY_SECONDS = 30.0
_ERASE_LINE, _ERASE_BELOW = "\x1b[K", "\x1b[J"  # from the cursor to the end of its line, or of the screen


class Display:
    """Lines at the bottom of a terminal that are redrawn in place, below plain lines; elsewhere, plain lines only.

    With `quiet` nothing is written. Several live lines have an empty one above them, on which the cursor stays: what
    another process writes appears there, above them, and a window that changes its size, or a process that is killed,
    leaves nothing behind that the next lines do not cover.
    """

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic, *, quiet: bool = False
    ) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.quiet = quiet
        self.live = not quiet and self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self._clock = clock
        self._drawn_at = -math.inf  # as long as nothing is drawn
        self._below = 0  # lines drawn below that of the cursor

    @property
    def columns(self) -> int:
        """Characters that fit into the live line; asked each time, since windows change size."""
        return _size(self.stream).columns - 1

    @property
    def drawn(self) -> bool:
        """Whether a live line is on the screen."""
        return self._drawn_at > -math.inf

    def may_redraw(self) -> bool:
        """Whether there is a live line, and the last redraw is long enough ago."""
        return self.live and self._clock() - self._drawn_at >= _REDRAW_SECONDS

    def draw(self, *lines: str) -> None:
        """Shows the live line, or lines, as far as they fit; writes nothing if there are none."""
        if not self.live:
            return
        columns = self.columns
        fitted = [_cut(shown(line), columns) for line in lines[: max(1, _size(self.stream).lines - 2)]]
        if len(lines) == 1:
            self._write(f"\r{fitted[0]}{_ERASE_BELOW if self._below else _ERASE_LINE}")
            self._below = 0
        else:
            below = "".join(f"\n{line}{_ERASE_LINE}" for line in fitted)
            self._write(f"\r{_ERASE_LINE}{below}{_ERASE_BELOW}\r\x1b[{len(fitted)}A")
            self._below = len(fitted)
        self._drawn_at = self._clock()
        before_saying(self.clear)

    def print(self, text: str) -> None:
        """Writes a plain line; the live line goes."""
        self.clear()
        if not self.quiet:
            self._write(shown_lines(text) + "\n")

    def clear(self) -> None:
        """Erases the live lines, so that other output can follow."""
        if self.drawn:
            self._write(f"\r{_ERASE_BELOW if self._below else _ERASE_LINE}")
            self._drawn_at = -math.inf

    def leave(self) -> None:
        """Keeps the live lines as they are, moves below them, and draws no others."""
        if self.drawn:
            self._write(f"\x1b[{self._below}B\r\n" if self._below else "\n")
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
    terminal `advance` redraws the live lines at most ten times a second; elsewhere only `log` writes, one line per row.
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
        self._view = LiveView(self._display.stream)
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
        self._view.add(row)
        self.advance(row["step"])
        if self._display.live:
            self._draw()
        else:
            self._display.print("  ".join([f"step {self._step}/{self._total_steps}", *self._figures(row)]))

    def log_evaluation(self, row: EvaluationRow) -> None:
        """Prints the result of an evaluation as a line of its own; its time does not count as training time."""
        self._view.add_evaluation(row)
        which = "EMA weights, " if row["eval"].endswith("_ema") else ""
        if "shots" in row:
            few_shot = cast(FewShotRow, row)
            kind = "few-shot accuracy"
            figures = [f"{shots}-shot {format_share(found['mean'])}" for shots, found in few_shot["shots"].items()]
        elif "figures" in row:
            kind = row["eval"].removesuffix("_ema")
            figures = [f"{name} {number:.4g}" for name, number in cast(OwnRow, row)["figures"].items()]
        else:
            kind, figures = "evaluation", [f"loss {cast(EvalRow | LossRow, row)['loss']:.4g}"]
        if "top1" in row:
            one = cast(EvalRow, row)
            top5 = [] if one["top5"] is None else [f"top-5 {format_share(one['top5'])}"]
            figures = [f"top-1 {format_share(one['top1'])}", *top5, *figures]
        images = "" if "figures" in row else f"{cast(EvalRow | FewShotRow | LossRow, row)['samples']:,} images "
        self.message(
            f"{kind} ({which}step {row['step']}): {'  '.join(figures)}  ({images}in {format_duration(row['seconds'])})"
        )
        self._rate.start(self._step, self._clock())

    def message(self, text: str) -> None:
        """Prints `text` above the live lines."""
        self._display.print(text)
        if self._row is not None:
            self._draw()

    @property
    def live(self) -> bool:
        """Whether it draws lines on a terminal."""
        return self._display.live

    def event(self, event: Event) -> None:
        """Shows an incident with the next redraw."""
        self._view.add_event(event)

    def close(self) -> None:
        """Leaves the last live lines on the screen and moves below them."""
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

    def _figures(self, row: TrainRow) -> list[str]:
        """The figures of a plain line, the most important first."""
        figures = [f"loss {row['loss']:.4f}"]
        if self.eta_seconds is not None and self._step < self._total_steps:
            figures.append(f"ETA {format_duration(self.eta_seconds)}")
        figures.append(f"{row['images_per_second']:,.0f} images/s")
        figures += [] if row["mfu"] is None else [f"MFU {format_share(row['mfu'])}"]
        figures += [f"data wait {format_share(row['data_wait'])}", f"lr {row['lr']:.3g}"]
        return figures + ([] if row["epoch"] is None else [f"epoch {row['epoch']:.2f}"])

    def _draw(self) -> None:
        position = Position(self._step, self._total_steps, self.eta_seconds)
        self._display.draw(*self._view.lines(position, self._display.columns))


def _cut(text: str, columns: int) -> str:
    """The beginning of a text that fits; characters of East Asian scripts take two columns."""
    if text.isascii():
        return text[:columns]
    taken = 0
    for number, character in enumerate(text):
        wide = unicodedata.east_asian_width(character) in ("W", "F")
        taken += 0 if unicodedata.combining(character) else 1 + wide
        if taken > columns:
            return text[:number]
    return text


def _size(stream: TextIO) -> os.terminal_size:
    """Columns and lines of the terminal behind `stream`."""
    try:
        found = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        found = shutil.get_terminal_size()
    return os.terminal_size((found.columns or 80, found.lines or 24))  # 0: a terminal that was never told its size
