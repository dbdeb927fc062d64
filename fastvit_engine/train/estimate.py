"""What a run would take: steps, operations and days, by a step's time as `sizing.step_time` has it."""

from collections.abc import Mapping
from typing import Any

from fastvit_engine.data.stream.batch_split import split_batch
from fastvit_engine.errors import UserError
from fastvit_engine.models import run_flops
from fastvit_engine.observe.units import counted, format_bytes, format_count, format_flops
from fastvit_engine.sizing.defaults import Chosen
from fastvit_engine.sizing.step_time import Speed, StepTime, step_time
from fastvit_engine.train.schedule import Schedule


def training_time(chosen: Chosen, speed: Speed, samples_per_epoch: int | None) -> dict[str, Any]:
    """A step's time, steps, operations and days; None, and why under `unknown`, if the length of an epoch is not known.

    Times are in seconds, but for the days.
    """
    config = chosen.config
    flops, computed = run_flops(config)
    step = step_time(chosen, speed)
    rate = config.train.global_batch_size / step.total
    time = {
        "flops_per_image": flops,
        "computed_flops_per_image": computed,
        "images_per_second": rate,
        "step": as_json(step),
        "computing_is": "measured" if speed.image.measured else "assumed",
        "computing_from": speed.image.source,
        "communicating_is": "modelled",
        "interconnect": speed.interconnect.describe(nodes=2),
        "steps": None,
        "images": None,
        "flops": None,
        "days": None,
        "save_interval": None,
    }
    try:
        schedule = Schedule(config, samples_per_epoch)
    except UserError as error:
        return {**time, "unknown": str(error)}
    images = schedule.total_steps * config.train.global_batch_size
    return {
        **time,
        "steps": schedule.total_steps,
        "images": images,
        "flops": images * flops,
        "days": images / rate / 86400,
        "save_interval": step.total * (schedule.save_every or schedule.total_steps),
    }


def as_json(step: StepTime) -> dict[str, Any]:
    return {
        "seconds": step.total,
        "computing": step.computing,
        "communicating": step.communicating,
        "exposed": step.exposed,
        "messages": step.messages,
        "sent_bytes": step.sent_bytes,
    }


def describe_time(time: Mapping[str, Any], speed: Speed, chosen: Chosen) -> list[str]:
    """What `training_time` returns, one line each."""
    step, machine = time["step"], chosen.machine
    lines = [f"computation   {_seconds(step['computing'])} per step, {speed.image.source}"]
    if machine.processes > 1:
        nodes = machine.processes // machine.processes_per_node
        assumed = ", assumed" if speed.interconnect.assumed else ""
        hidden = step["communicating"] - step["exposed"]
        behind = (
            f", {_seconds(hidden)} of them behind computation" if hidden > 5e-5 else ", none of it behind computation"
        )
        lines.append(
            f"communication {_seconds(step['communicating'])} per step{behind}: "
            f"{counted(step['messages'], 'message')}, {format_bytes(step['sent_bytes'])} from each {machine.device} "
            f"(modelled: {speed.interconnect.describe(nodes)}{assumed})"
        )
    speed_of_run = f"{time['images_per_second']:,.0f} images/s, {_seconds(step['seconds'])} per step"
    if time["steps"] is None:
        return [f"length        unknown: {time['unknown']}", *lines, f"time          unknown: {speed_of_run}"]
    images = "image" if time["images"] == 1 else "images"
    computed = time["computed_flops_per_image"]
    fewer = "" if computed == time["flops_per_image"] else f", {format_flops(computed)} of them computed"
    return [
        f"length        {counted(time['steps'], 'step')}, {format_count(time['images'])} {images}, "
        f"{format_flops(time['flops'])} ({format_flops(time['flops_per_image'])} per image{fewer})",
        *lines,
        f"time          {_days(time['days'])}: {speed_of_run}, without evaluations and checkpoints",
    ]


def _seconds(seconds: float) -> str:
    if seconds < 0.1:
        return f"{1e3 * seconds:.2g} ms"
    return f"{seconds:.3g} s"


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
