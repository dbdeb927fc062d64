"""What a run would take: steps, operations and days, by a step's time as `sizing.step_time` has it."""

from collections.abc import Mapping
from typing import Any

from fastvit_engine.config import Config
from fastvit_engine.config.phases import Phase
from fastvit_engine.data.stream.batch_split import split_batch
from fastvit_engine.errors import UserError
from fastvit_engine.models.flops import RunFlops, run_flops
from fastvit_engine.observe.units import counted, format_bytes, format_count, format_flops
from fastvit_engine.sizing.defaults import Chosen
from fastvit_engine.sizing.step_time import Speed, StepTime, step_time
from fastvit_engine.train.compute import Compute
from fastvit_engine.train.schedule import Schedule


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


def work_of(chosen: Chosen, samples_per_epoch: int | None) -> float:
    """What an image takes to compute, on average over the phases of a run, as a share of what a whole one takes."""
    return _flops_per_image(chosen, samples_per_epoch).computed / run_flops(chosen.config).computed


def training_time(chosen: Chosen, speed: Speed, samples_per_epoch: int | None) -> dict[str, Any]:
    """A step's time, steps, operations and days; None, and why under `unknown`, if the length of an epoch is not known.

    Times are in seconds, but for the days.
    """
    config = chosen.config
    flops, computed = _flops_per_image(chosen, samples_per_epoch)
    step = step_time(chosen, speed, work_of(chosen, samples_per_epoch))
    rate = config.train.global_batch_size / step.total
    time: dict[str, Any] = {
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
    return {
        **time,
        "steps": steps,
        "images": images,
        "flops": compute.of_steps(schedule.phases, 0, steps).whole,
        "days": images / rate / 86400,
        "save_interval": step.total * (schedule.save_every or steps),
        "phases": phases,
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
    each = time["phases"] if len(time["phases"]) > 1 else []
    mean = ", on average" if each else ""
    return [
        f"length        {counted(time['steps'], 'step')}, {format_count(time['images'])} {images}, "
        f"{format_flops(time['flops'])} ({format_flops(time['flops_per_image'])} per image{mean}{fewer})",
        *(f"{'' if number else 'phases':14}{_describe_phase(phase)}" for number, phase in enumerate(each)),
        *lines,
        f"time          {_days(time['days'])}: {speed_of_run}{mean}, without evaluations and checkpoints",
    ]


def _describe_phase(phase: Mapping[str, Any]) -> str:
    first, seen = phase["first_step"], Phase(phase["first_step"], phase["image_size"], phase["patch_drop"])
    return (
        f"steps {first + 1:,} to {first + phase['steps']:,}: {seen.describe()}, "
        f"{format_flops(phase['computed_flops_per_image'])} computed per image"
    )


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
