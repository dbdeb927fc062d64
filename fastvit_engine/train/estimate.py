"""What a run would take: steps, operations and days, at a share of the GPUs' peak that is assumed."""

from collections.abc import Mapping
from typing import Any

from fastvit_engine.config.model_shape import tokens_in_training
from fastvit_engine.data.stream.batch_split import split_batch
from fastvit_engine.errors import UserError
from fastvit_engine.models import run_flops
from fastvit_engine.models.flops import recomputed_flops
from fastvit_engine.observe.units import counted, format_count, format_flops, format_share
from fastvit_engine.sizing.defaults import Chosen
from fastvit_engine.sizing.gpus import DATASHEET_PEAK
from fastvit_engine.sizing.memory import checkpointed_blocks
from fastvit_engine.train.schedule import Schedule

USUAL_MFU = 0.4  # an assumption


def images_per_second(chosen: Chosen, gpu: str, mfu: float) -> float:
    """The GPUs with the largest share of the global batch set the pace."""
    split = split_batch(chosen.config, chosen.machine.processes)
    share = split.global_batch_size / split.largest_share  # GPUs' worth of work that a step has
    config = chosen.config
    again = recomputed_flops(tokens_in_training(config), config.model, checkpointed_blocks(config))
    return mfu * DATASHEET_PEAK[gpu] * share / (run_flops(config).computed + again)


def training_time(chosen: Chosen, gpu: str, mfu: float, samples_per_epoch: int | None) -> dict[str, Any]:
    """Steps, operations and days; None, and why under `unknown`, if the length of an epoch is not known."""
    config = chosen.config
    flops, computed = run_flops(config)
    rate = images_per_second(chosen, gpu, mfu)
    time = {
        "flops_per_image": flops,
        "computed_flops_per_image": computed,
        "images_per_second": rate,
        "steps": None,
        "images": None,
        "flops": None,
        "days": None,
    }
    try:
        steps = Schedule(config, samples_per_epoch).total_steps
    except UserError as error:
        return {**time, "unknown": str(error)}
    images = steps * config.train.global_batch_size
    return {**time, "steps": steps, "images": images, "flops": images * flops, "days": images / rate / 86400}


def describe_time(time: Mapping[str, Any], gpu: str, mfu: float) -> list[str]:
    """What `training_time` returns, one line each."""
    if time["steps"] is None:
        return [f"length        unknown: {time['unknown']}"]
    images = "image" if time["images"] == 1 else "images"
    computed = time["computed_flops_per_image"]
    fewer = "" if computed == time["flops_per_image"] else f", {format_flops(computed)} of them computed"
    return [
        f"length        {counted(time['steps'], 'step')}, {format_count(time['images'])} {images}, "
        f"{format_flops(time['flops'])} ({format_flops(time['flops_per_image'])} per image{fewer})",
        f"time          {_days(time['days'])}: {time['images_per_second']:,.0f} images/s, if MFU is "
        f"{format_share(mfu)} of {format_flops(DATASHEET_PEAK[gpu])}/s per GPU (an assumption), without "
        "evaluations and checkpoints",
    ]


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
