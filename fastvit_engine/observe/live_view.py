"""What a terminal shows of a run while it trains: a few lines with its position, figures, evaluations and incidents."""

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import NamedTuple, TextIO, cast

from fastvit_engine.observe.events import Event
from fastvit_engine.observe.metrics import EvalRow, EvaluationRow, FewShotRow, LossRow, OwnRow, TrainRow
from fastvit_engine.observe.units import counted, format_bytes, format_duration, format_share

_BARS = "▁▂▃▄▅▆▇█"
_LOSSES = 30  # rows that the curve shows
_MAX_BAR = 30  # characters
_MIN_BAR = 8
_INCIDENTS = {  # kinds of events, in the singular and in the plural
    "rewind": ("rewind", "rewinds"),
    "hang": ("hang", "hangs"),
    "failure": ("failure", "failures"),
    "slow_rank": ("slow rank", "slow ranks"),
    "fp8_fallback": ("fallback to bf16", "fallbacks to bf16"),
    "checkpoint_failed": ("checkpoint could not be saved", "checkpoints could not be saved"),
    "checkpoint_damaged": ("damaged checkpoint", "damaged checkpoints"),
}


class Position(NamedTuple):
    """How far a run is."""

    step: int
    total_steps: int
    eta_seconds: float | None


class LiveView:
    """Keeps what the lines are made of; `stream` is where they go."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._done, self._left = ("━", "─") if _can_show(stream, "━─") else ("#", "-")
        self._has_bars = _can_show(stream, _BARS)
        self._row: TrainRow | None = None
        self._losses: deque[float] = deque(maxlen=_LOSSES)
        self._evaluations: dict[str, EvaluationRow] = {}
        self._events = Counter[str]()
        self._saved_at: float | None = None

    def add(self, row: TrainRow) -> None:
        self._row = row
        self._losses.append(row["loss"])

    def add_evaluation(self, row: EvaluationRow) -> None:
        self._evaluations[row["eval"]] = row

    def add_event(self, event: Event) -> None:
        self._events[event["event"]] += 1
        if event["event"] == "checkpoint":
            with suppress(ValueError):  # of a file that somebody has changed
                self._saved_at = datetime.fromisoformat(event["time"]).timestamp()

    def lines(self, position: Position, width: int) -> list[str]:
        """Lines of at most `width` characters; the least important figures are left out first."""
        found = [self._progress(position, width)]
        for parts in (self._training(), self._speed(), self._accuracy(), self._incidents()):
            if parts:
                found.append(fitting(parts, width))
        return found

    def _progress(self, position: Position, width: int) -> str:
        figures = [f"{position.step}/{position.total_steps}"]
        if position.eta_seconds is not None and position.step < position.total_steps:
            figures.append(f"ETA {format_duration(position.eta_seconds)}")
        if self._row is not None and self._row["epoch"] is not None:
            figures.append(f"epoch {self._row['epoch']:.2f}")
        text = fitting(figures, width - _MIN_BAR - 1)
        room = width - len(text) - 1
        if room < _MIN_BAR:
            return text[:width]
        bar = min(room, _MAX_BAR)
        filled = bar * position.step // max(1, position.total_steps)
        return f"{self._done * filled}{self._left * (bar - filled)} {text}"

    def _training(self) -> list[str]:
        row = self._row
        if row is None:
            return []
        curve = [curve_of(self._losses)] if self._has_bars and len(self._losses) > 1 else []
        norm = [] if row["grad_norm"] is None else [f"gradient norm {row['grad_norm']:.3g}"]
        return [f"loss {row['loss']:.4f}", *curve, f"lr {row['lr']:.3g}", *norm]

    def _speed(self) -> list[str]:
        row = self._row
        if row is None:
            return []
        mfu = [] if row["mfu"] is None else [f"MFU {format_share(row['mfu'])}"]
        memory = f"memory {format_bytes(row['memory_bytes'])}"
        return [
            f"{row['images_per_second']:,.0f} images/s",
            *mfu,
            f"data wait {format_share(row['data_wait'])}",
            memory,
        ]

    def _accuracy(self) -> list[str]:
        parts = []
        for name, row in self._evaluations.items():
            which = "EMA " if name.endswith("_ema") else ""
            if "shots" in row:
                shots = cast(FewShotRow, row)["shots"]
                parts += [f"{which}{number}-shot {format_share(found['mean'])}" for number, found in shots.items()]
            elif "figures" in row:
                own = cast(OwnRow, row)["figures"]
                parts += [f"{which}{figure} {number:.4g}" for figure, number in own.items()]
            elif "top1" not in row:
                parts.append(f"{which}held-out loss {cast(LossRow, row)['loss']:.4g} (step {row['step']})")
            else:
                parts.append(f"{which}top-1 {format_share(cast(EvalRow, row)['top1'])} (step {row['step']})")
        return parts

    def _incidents(self) -> list[str]:
        saved = []
        if self._saved_at is not None:
            saved = [f"saved {format_duration(max(0.0, self._clock() - self._saved_at))} ago"]
        return saved + [counted(self._events[kind], *names) for kind, names in _INCIDENTS.items() if self._events[kind]]


def fitting(parts: Sequence[str], width: int) -> str:
    """As many of the parts as fit, from the first on, with two spaces between; the first one always."""
    text = parts[0]
    for part in parts[1:]:
        if len(f"{text}  {part}") > width:
            break
        text = f"{text}  {part}"
    return text


def curve_of(values: Iterable[float]) -> str:
    """A bar per value between the smallest and the largest; "!" for one that is not finite."""
    numbers = list(values)
    finite = [value for value in numbers if math.isfinite(value)]
    low = min(finite, default=0.0)
    span = max(finite, default=0.0) - low or 1.0
    return "".join(
        _BARS[min(len(_BARS) - 1, int((value - low) / span * len(_BARS)))] if math.isfinite(value) else "!"
        for value in numbers
    )


def _can_show(stream: TextIO, text: str) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True
