"""Durations with a unit, and their length in steps: "90 epochs", "10_000 steps", "300M samples", "5%"."""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator

from fastvit_engine.errors import UserError

# What a duration looks like, for people: a test parses each example.
EXAMPLES = ("90 epochs", "10k steps", "300M samples", "5%")
SYNTAX = (
    f"a number with a unit, such as {', '.join(EXAMPLES[:-1])}, or {EXAMPLES[-1]} of the run (not for train.duration); "
    "k, M and B mean thousand, million and billion"
)

_PATTERN = re.compile(r"([0-9][0-9_]*\.?[0-9]*)\s*([kMB]?)\s*(steps?|epochs?|samples?|%|percent)")
_BARE_NUMBER = re.compile(r"[0-9][0-9_]*\.?[0-9]*\s*[kMB]?")
_LONGEST = 1e15
_MAGNITUDE = {"": 1, "k": 1_000, "M": 1_000_000, "B": 1_000_000_000}


def parse_duration(text: str) -> tuple[float, str]:
    """Splits "300M samples" into (3e8, "sample"); units are step, epoch, sample and %.

    Raises ValueError on anything else.
    """
    text = text.strip()
    match = _PATTERN.fullmatch(text)
    if match is not None:
        number, magnitude, unit = match.groups()
        value, unit = float(number) * _MAGNITUDE[magnitude], "%" if unit == "percent" else unit.rstrip("s")
        if value > (_LONGEST if unit != "%" else 100):
            raise ValueError(
                f"'{_shortened(text)}' is too long: at most {_LONGEST:.0e} steps, epochs or samples, or 100%"
            )
        return value, unit
    if _BARE_NUMBER.fullmatch(text):
        raise ValueError(
            f"{text!r} is not a duration without a unit: write '{text} steps', '{text} epochs', '{text} samples' or "
            f"'{text}%'"
        )
    raise ValueError(f"{text!r} is not a duration; write for example '10000 steps', '90 epochs', '300M samples', '5%'")


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:20]}...{text[-10:]}"


def _checked(value: Any) -> Any:
    """`value` as it is, if it is a duration. A plain number gets the sentence about its unit."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str):
        parse_duration(value)
    return value


Duration = Annotated[str, BeforeValidator(_checked)]


@dataclass(frozen=True)
class BatchSizes:
    """The global batch of a run, which may change when the run resumes: (step, images per step from then on) pairs.

    Steps rise, from 0. So the number of samples after each step is known, and the other way round.
    """

    changes: tuple[tuple[int, int], ...]

    @classmethod
    def always(cls, size: int) -> "BatchSizes":
        return cls(((0, size),))

    @property
    def current(self) -> int:
        return self.changes[-1][1]

    def then(self, step: int, size: int) -> "BatchSizes":
        """The same until `step` steps are done, and `size` images per step from there on."""
        kept = tuple(change for change in self.changes if change[0] < step)
        return BatchSizes(kept if kept and kept[-1][1] == size else (*kept, (step if kept else 0, size)))

    def samples(self, step: int) -> int:
        """The samples of the first `step` steps."""
        starts = [first for first, _ in self.changes[1:]]
        spans = zip(self.changes, [*starts, step], strict=True)
        return sum(size * max(0, min(last, step) - first) for (first, size), last in spans)

    def steps(self, samples: float) -> float:
        """The steps that take this many samples."""
        first, size = next(change for change in reversed(self.changes) if self.samples(change[0]) <= samples)
        return first + (samples - self.samples(first)) / size


def to_steps(
    duration: str, *, key: str, batch_sizes: BatchSizes, samples_per_epoch: int | None, total_steps: float | None = None
) -> int:
    """Number of optimizer steps in `duration`, rounded to the nearest; an epoch is `samples_per_epoch` samples.

    Counted from the beginning of the run.

    Raises UserError naming the configuration key `key` if that takes a number that is not known.
    """
    value, unit = parse_duration(duration)
    if unit == "step":
        steps = value
    elif unit == "sample":
        steps = batch_sizes.steps(value)
    elif unit == "epoch":
        if samples_per_epoch is None:
            raise UserError(
                f"{key} = '{duration}' is in epochs, but the number of training samples is unknown: set "
                "data.train_samples, or write the duration in steps or samples"
            )
        steps = batch_sizes.steps(value * samples_per_epoch)
    else:
        if total_steps is None:
            raise UserError(
                f"{key} = '{duration}' is a fraction of the run and cannot be the length of the run itself: use steps, "
                "epochs or samples"
            )
        steps = value / 100 * total_steps
    return max(0, math.floor(steps + 0.5))
