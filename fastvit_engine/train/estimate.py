"""What a run would take: steps, operations and days, at a share of the GPUs' peak that is assumed."""

from collections.abc import Mapping
from typing import Any

from fastvit_engine.config import Config
from fastvit_engine.config.model_shape import resolve_shape, tokens_in_training, visible_patches
from fastvit_engine.config.phases import Phase
from fastvit_engine.data.stream.batch_split import split_batch
from fastvit_engine.errors import UserError
from fastvit_engine.models.flops import RunFlops, recomputed_flops
from fastvit_engine.observe.units import counted, format_count, format_flops, format_share
from fastvit_engine.sizing.defaults import Chosen
from fastvit_engine.sizing.gpus import DATASHEET_PEAK
from fastvit_engine.sizing.memory import checkpointed_blocks
from fastvit_engine.train.compute import Compute
from fastvit_engine.train.schedule import Schedule

USUAL_MFU = 0.4  # an assumption


def images_per_second(chosen: Chosen, gpu: str, mfu: float, samples_per_epoch: int | None) -> float:
    """On average over the run. The GPUs with the largest share of the global batch set the pace."""
    split = split_batch(chosen.config, chosen.machine.processes)
    share = split.global_batch_size / split.largest_share  # GPUs' worth of work that a step has
    spans = _spans(chosen.config, samples_per_epoch)
    again = sum(steps * _recomputed(chosen.config, phase) for phase, steps in spans) / sum(steps for _, steps in spans)
    return mfu * DATASHEET_PEAK[gpu] * share / (_flops_per_image(chosen, samples_per_epoch).computed + again)


def _spans(config: Config, samples_per_epoch: int | None) -> list[tuple[Phase, int]]:
    """The phases of a run and their steps; if its length is not known, the last phase alone."""
    try:
        schedule = Schedule(config, samples_per_epoch)
    except UserError:
        return [(Phase(0, config.model.image_size, 0.0), 1)]
    return schedule.phases.spans(0, schedule.total_steps)


def _flops_per_image(chosen: Chosen, samples_per_epoch: int | None) -> RunFlops:
    """On average over the run."""
    compute = Compute(chosen.config, split_batch(chosen.config, chosen.machine.processes))
    return compute.mean_of(_spans(chosen.config, samples_per_epoch))


def _recomputed(config: Config, phase: Phase) -> int:
    """What activation checkpointing computes a second time, for an image of a phase."""
    if (blocks := checkpointed_blocks(config)) == 0:
        return 0
    if config.pretraining is not None:
        return recomputed_flops(tokens_in_training(config), config.model, blocks)
    shape = resolve_shape(config.model.model_copy(update={"image_size": phase.image_size}))
    seen = shape.prefix + visible_patches(shape.patches, phase.patch_drop)
    return recomputed_flops(seen, config.model, blocks)


def training_time(chosen: Chosen, gpu: str, mfu: float, samples_per_epoch: int | None) -> dict[str, Any]:
    """Steps, operations and days; None, and why under `unknown`, if the length of an epoch is not known."""
    config = chosen.config
    flops, computed = _flops_per_image(chosen, samples_per_epoch)
    rate = images_per_second(chosen, gpu, mfu, samples_per_epoch)
    time: dict[str, Any] = {
        "flops_per_image": flops,
        "computed_flops_per_image": computed,
        "images_per_second": rate,
        "steps": None,
        "images": None,
        "flops": None,
        "days": None,
        "phases": [],
    }
    try:
        schedule = Schedule(config, samples_per_epoch)
    except UserError as error:
        return {**time, "unknown": str(error)}
    steps, compute = schedule.total_steps, Compute(config, split_batch(config, chosen.machine.processes))
    images = steps * config.train.global_batch_size
    phases = [
        {**phase._asdict(), "steps": count, "computed_flops_per_image": compute.per_image(phase).computed}
        for phase, count in schedule.phases.spans(0, steps)
    ]
    whole = compute.of_steps(schedule.phases, 0, steps).whole
    days = images / rate / 86400
    return {**time, "steps": steps, "images": images, "flops": whole, "days": days, "phases": phases}


def describe_time(time: Mapping[str, Any], gpu: str, mfu: float) -> list[str]:
    """What `training_time` returns, one line each."""
    if time["steps"] is None:
        return [f"length        unknown: {time['unknown']}"]
    images = "image" if time["images"] == 1 else "images"
    computed = time["computed_flops_per_image"]
    fewer = "" if computed == time["flops_per_image"] else f", {format_flops(computed)} of them computed"
    each = time["phases"] if len(time["phases"]) > 1 else []
    mean = ", on average" if each else ""
    return [
        f"length        {counted(time['steps'], 'step')}, {format_count(time['images'])} {images}, "
        f"{format_flops(time['flops'])} ({format_flops(time['flops_per_image'])} per image{mean}{fewer})",
        *(f"{'' if number else 'phases':14}{_describe_phase(phase)}" for number, phase in enumerate(each)),
        f"time          {_days(time['days'])}: {time['images_per_second']:,.0f} images/s, if MFU is "
        f"{format_share(mfu)} of {format_flops(DATASHEET_PEAK[gpu])}/s per GPU (an assumption), without "
        "evaluations and checkpoints",
    ]


def _describe_phase(phase: Mapping[str, Any]) -> str:
    first, seen = phase["first_step"], Phase(phase["first_step"], phase["image_size"], phase["patch_drop"])
    return (
        f"steps {first + 1:,} to {first + phase['steps']:,}: {seen.describe()}, "
        f"{format_flops(phase['computed_flops_per_image'])} computed per image"
    )


def describe_split(chosen: Chosen) -> str:
    """The global batch as a product, on one line."""
    split = split_batch(chosen.config, chosen.machine.processes)
    passes = counted(split.accumulation_steps, "micro-batch", "micro-batches")
    devices = (
        counted(split.world_size, "GPU") if chosen.machine.on_gpu else counted(split.world_size, "process", "processes")
    )
    if split.equal:
        product = f"{devices} x {counted(split.micro_batch_size, 'image')} x {passes}"
    else:
        shares = describe_shares(split.largest_share, split.smallest_share)
        product = f"{devices} x {shares} images, in {passes} of at most {split.micro_batch_size}"
    return f"global batch  {counted(split.global_batch_size, 'image')} = {product}"


def describe_shares(largest: int, smallest: int) -> str:
    return f"{largest}" if largest == smallest else f"{largest} or {smallest}"


def _days(days: float) -> str:
    if days >= 2:
        return f"{days:,.1f} days"
    return f"{24 * days:,.1f} hours" if 24 * days >= 0.1 else "a few minutes at most"
