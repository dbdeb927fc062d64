"""The phases of a run in steps, from the points that section `tokens` names."""

import math

from fastvit_engine.config import Config
from fastvit_engine.config.phases import Phase, Phases
from fastvit_engine.duration import BatchSizes, parse_duration, to_steps
from fastvit_engine.errors import UserError


def phases_of(config: Config, total_steps: int, samples_per_epoch: int | None, batch_sizes: BatchSizes) -> Phases:
    """Phases that are shorter than half a step are left out.

    Raises UserError if a point cannot be converted, is after the end of the run, or before the one before it.
    """
    tokens = config.tokens

    def step_of(key: str, until: str) -> int:
        value, unit = parse_duration(until)
        if unit == "%" and parse_duration(config.train.duration)[1] != "step":
            # of the samples: the batch may have changed, and with it the steps that are left
            step = math.floor(batch_sizes.steps(value / 100 * batch_sizes.samples(total_steps)) + 0.5)
        else:
            step = to_steps(
                until,
                key=key,
                batch_sizes=batch_sizes,
                samples_per_epoch=samples_per_epoch,
                total_steps=total_steps,
            )
        if step > total_steps:
            raise UserError(
                f"{key} has the point '{until}', which is step {step:,}, after the end of the run of {total_steps:,} "
                "steps: choose an earlier one"
            )
        return step

    ends = [(size, step_of("tokens.image_sizes", until)) for size, until in tokens.image_sizes]
    for (_, before), (size, end) in zip(ends, ends[1:], strict=False):
        if end < before:
            raise UserError(f"tokens.image_sizes ends the images of {size} pixels before smaller ones: let points rise")
    if ends and ends[-1][1] >= total_steps:
        raise UserError(
            f"tokens.image_sizes leaves no step of the {total_steps:,} to images of model.image_size, which evaluation "
            "sees: let the last size end before the run does"
        )
    dropped_until = step_of("tokens.patch_drop_until", tokens.patch_drop_until) if tokens.patch_drop else 0
    starts = sorted({0, *(end for _, end in ends), *([dropped_until] if dropped_until < total_steps else [])})
    return Phases(
        tuple(
            Phase(
                first,
                next((size for size, end in ends if first < end), config.model.image_size),
                tokens.patch_drop if first < dropped_until else 0.0,
            )
            for first in starts
        )
    )
