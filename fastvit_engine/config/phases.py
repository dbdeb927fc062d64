"""The phases of a run: how large its images are in each step, and how many of their patches the model sees."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from fastvit_engine.config.sections import Config


class Phase(NamedTuple):
    """Steps of a run in which every image costs the same."""

    first_step: int  # steps done before it
    image_size: int  # pixels
    patch_drop: float  # share of the patches that are left out

    def describe(self) -> str:
        dropped = f", {100 * self.patch_drop:g} % of the patches dropped" if self.patch_drop else ""
        return f"images of {self.image_size} px{dropped}"


@dataclass(frozen=True)
class Phases:
    """The phases of a run, one after the other; the last one never ends."""

    phases: tuple[Phase, ...]

    def at(self, step: int) -> Phase:
        """The phase of the step after `step` steps are done."""
        starts = [phase.first_step for phase in self.phases]
        return self.phases[bisect_right(starts, step) - 1]

    def image_sizes_from(self, step: int) -> Callable[[int], int]:
        """The image size of the n-th step, from 0 on, after `step` steps are done."""
        return lambda number: self.at(step + number).image_size

    def spans(self, first: int, last: int) -> list[tuple[Phase, int]]:
        """The phases of the steps from `first` to before `last`, with how many of these steps each has."""
        ends = [phase.first_step for phase in self.phases[1:]] + [last]
        counted = [
            (phase, min(end, last) - max(phase.first_step, first)) for phase, end in zip(self.phases, ends, strict=True)
        ]
        return [(phase, steps) for phase, steps in counted if steps > 0]


def possible_phases(config: Config) -> list[Phase]:
    """What phases a run may have, whatever its length, with 0 for their first steps."""
    sizes = [*(size for size, _ in config.tokens.image_sizes), config.model.image_size]
    return [Phase(0, size, drop) for size in sizes for drop in sorted({0.0, config.tokens.patch_drop})]
