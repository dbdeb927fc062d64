"""A plan as a page for people."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fastvit_engine.commands.plan.options import CPU
from fastvit_engine.config import Config
from fastvit_engine.data.stream.batch_split import split_batch
from fastvit_engine.models import full_title, parameter_count
from fastvit_engine.observe.units import counted, format_bytes, format_count, format_duration, format_share
from fastvit_engine.sizing.copies import copies_bytes, keeps_copies
from fastvit_engine.sizing.defaults import Chosen
from fastvit_engine.sizing.needs import DECODED_FROM, SAVED_WITHIN, USUAL_SAMPLE, decoding_seconds
from fastvit_engine.sizing.policies import Policy
from fastvit_engine.sizing.reasons import as_written
from fastvit_engine.sizing.scaling import Point
from fastvit_engine.train.estimate import describe_shares, describe_split, describe_time

_NODE_LINES = 8  # numbers of nodes that are shown one by one


def as_text(gpu: str, found: Mapping[str, Any]) -> str:
    """found: what `fastvit plan` has computed."""
    chosen: Chosen = found["chosen"]
    config = chosen.config
    text = [
        _title(gpu, chosen),
        "",
        *_memory_table(chosen, found["stages"]),
        *_policy_table(chosen, found["policies"]),
        "",
        "settings",
        *_choices(chosen),
        "",
        describe_split(chosen),
        *_describe_subset(config),
        *_describe_packing(config),
        *describe_time(found["time"], found["speed"], chosen),
        *_needs(found, chosen),
    ]
    if len(found["nodes"]) > 1:
        text += ["", "on other numbers of nodes", *_nodes_table(found["nodes"])]
    if found["scaling"]:
        text += ["", *_scaling_table(found["scaling"], measured=found["speed"].image.measured)]
    text += ["", *_doubts(chosen)]
    return "\n".join(text)


def _title(gpu: str, chosen: Chosen) -> str:
    config, machine = chosen.config, chosen.machine
    nodes = machine.processes // machine.processes_per_node
    parameters = parameter_count(config.model, config.pretraining)
    if config.pretraining is not None:
        added = parameters - parameter_count(config.model)
        with_head = f", {format_count(added)} of them for train.objective = {config.train.objective} only"
    else:
        hidden = " and its hidden layer (head: mlp)" if config.model.head == "mlp" else ""
        with_head = f" with a head for {counted(config.model.num_classes, 'class', 'classes')}{hidden}"
    devices = counted(machine.processes, "process", "processes") if gpu == CPU else f"{machine.processes} x {gpu}"
    share = "" if nodes == 1 else f" in {nodes} nodes"
    return (
        f"{full_title(config.model)}, {format_count(parameters)} parameters{with_head}, "
        f"{config.train.precision}, on {devices}{share}: "
        f"{format_bytes(machine.usable)} of {format_bytes(machine.memory)} of each {machine.device} for the model"
    )


def _memory_table(chosen: Chosen, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    config, machine = chosen.config, chosen.machine
    micro_batch = split_batch(config, machine.processes).micro_batch_size
    parts = ["weights", "gradients", "optimizer", "average", "buffers", "captured", "update", "activations", "work"]
    unused = {"average": config.ema.decay is None, "captured": not config.train.cuda_graph}
    parts = [part for part in parts if not unused.get(part)]
    together = " + ".join(part for part in parts if part not in ("update", "activations", "work"))
    together += " + max(update, activations + work)"
    parts += ["host"] if config.zero.offload != "none" or config.train.offload_activations else []
    table = [["ZeRO", *parts, "together", "", "largest micro-batch"]]
    for row in rows:
        memory = row["memory"]
        mark = "fits" if memory.total <= machine.usable else "too much"
        mark += ", chosen" if row["stage"] == config.zero.stage else ""
        figures = [f"{getattr(memory, part) / 2**30:.1f}" for part in [*parts, "total"]]
        table.append([str(row["stage"]), *figures, mark, str(row["largest_micro_batch"] or "none")])
    about = f"GiB of each {machine.device} at a micro-batch of {counted(micro_batch, 'image')} (together = {together})"
    return [about, *_aligned(table, words=[len(parts) + 2])]


def _policy_table(chosen: Chosen, rows: Sequence[Policy]) -> list[str]:
    """What else blocks could keep for the backward pass."""
    if len(rows) < 2:
        return []
    machine = chosen.machine
    table = [["section train", "activations", "work", "host", "together", "", "largest micro-batch", "computed again"]]
    for row in rows:
        memory = row.memory
        mark = ("fits" if memory.total <= machine.usable else "too much") + (", chosen" if row.is_chosen else "")
        settings = [f"{key}={as_written(value)}" for key, value in row.settings.items() if value]
        sizes = [memory.activations, memory.work, memory.host, memory.total]
        figures = [f"{size / 2**30:.1f}" for size in sizes]
        again = format_share(row.again) if row.again else ""
        table.append(
            [" ".join(settings) or "all is kept", *figures, mark, str(row.largest_micro_batch or "none"), again]
        )
    about = f"at ZeRO stage {chosen.config.zero.stage}, by what blocks keep for the backward pass"
    return ["", about, *_aligned(table, words=[0, 5])]


def _aligned(table: Sequence[Sequence[str]], *, words: Collection[int]) -> list[str]:
    """As lines of columns: those of `words` to the left, numbers to the right."""
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if column in words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]


def _choices(chosen: Chosen) -> list[str]:
    longest = max(len(f"{choice.key} = {choice.value}") for choice in chosen.choices)
    return [
        "  " + f"{choice.key} = {str(choice.value).lower()}".ljust(longest) + f"  {choice.reason}"
        for choice in chosen.choices
    ]


def _describe_subset(config: Config) -> list[str]:
    """How many samples an epoch has, if it has not all of them."""
    data = config.data
    if data.subset is None:
        return []
    samples = f"{data.subset} of the samples" if data.epoch_samples is None else f"{data.epoch_samples:,} samples"
    return [f"data          an epoch is {samples}, data.subset = {data.subset}"]


def _describe_packing(config: Config) -> list[str]:
    """How many patches an image is taken to have: nobody has looked at the proportions of the images."""
    most, least = config.packing.max_patches, config.packing.min_patches
    if most is None:
        return []
    drawn = f"{most}" if least is None else f"{(least + most) / 2:g} (drawn from {least} to {most})"
    return [f"packing       {drawn} patches per image, an upper bound: rows and columns of patches are rounded down"]


def _needs(found: Mapping[str, Any], chosen: Chosen) -> list[str]:
    """Cost, checkpoints, shards and cores, one line each."""
    needs, cost, sample = found["needs"], found["cost"], found["sample_bytes"]
    machine, interval = chosen.machine, found["time"]["save_interval"]
    nodes = machine.processes // machine.processes_per_node
    lines = []
    if cost["gpu_hours"] is not None:
        price = "" if cost["cost"] is None else f": {cost['cost']:,.0f} at {cost['price']:g} each"
        lines.append(f"cost          {cost['gpu_hours']:,.0f} {machine.device}-hours{price}")
    every = "" if interval is None else f", every {format_duration(interval)}"
    lines.append(
        f"checkpoint    {format_bytes(needs.checkpoint_bytes)}{every}; to end within {SAVED_WITHIN:.0f} s, a save "
        f"writes {_rate(needs.write_bytes_per_second, nodes)}"
    )
    if keeps_copies(chosen.config, on_gpu=machine.on_gpu, nodes=nodes):
        size = format_bytes(copies_bytes(chosen.config, nodes))
        whose = "" if nodes == 1 else " per node, its own and that of the node before it"
        lines.append(
            f"copies        {size} of host memory for two copies of the newest state{whose}, checkpoint.in_memory"
        )
    assumed = " (photos as they are, assumed)" if sample == USUAL_SAMPLE else ""
    lines.append(
        f"reading       {_rate(needs.read_bytes_per_second, nodes)}, at {sample / 1000:g} kB per sample{assumed}"
    )
    each = "" if nodes == 1 else " per node"
    cores = needs.decoding_cores / nodes
    lines.append(
        f"decoding      {cores:.1f} cores{each}, at {1e3 * decoding_seconds(sample):.2f} ms per image "
        f"(measured: {DECODED_FROM})"
    )
    return lines


def _rate(rate: float, nodes: int) -> str:
    each = "" if nodes == 1 else f" ({format_bytes(rate / nodes)}/s per node)"
    return f"{format_bytes(rate)}/s{each}"


def _nodes_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each number of nodes; of many, the highest ones and every half."""
    most, shown = rows[0]["nodes"], {row["nodes"] for row in rows[:_NODE_LINES]}
    if most > 2 * _NODE_LINES:
        shown |= {most >> halvings for halvings in range(most.bit_length())}
    else:
        shown = {row["nodes"] for row in rows}
    lines = ["  nodes   GPUs  ZeRO  images per GPU  micro-batches  images/s"]
    for row in rows:
        if row["nodes"] not in shown:
            continue
        start = f"  {row['nodes']:>5}  {row['gpus']:>5}  "
        if "problem" in row:
            lines.append(f"{start}{row['problem']}")
            continue
        shares = describe_shares(row["largest_share"], row["smallest_share"])
        micro = f"{row['accumulation_steps']} x {row['micro_batch_size']}"
        lines.append(f"{start}{row['zero_stage']:>4}  {shares:>14}  {micro:>13}  {row['images_per_second']:>8,.0f}")
    return lines


def _scaling_table(points: Sequence[Point], *, measured: bool) -> list[str]:
    lines = ["by the number of GPUs", "   GPUs  nodes  ZeRO  images/s  efficiency  step (s)  exposed (ms)"]
    for point in points:
        start = f"  {point.processes:>5}  {point.nodes:>5}  "
        if point.step is None:
            lines.append(f"{start}{point.problem}")
            continue
        known = "measured" if measured and point.is_alone else "modelled"
        lines.append(
            f"{start}{point.zero_stage:>4}  {point.images_per_second:>8,.0f}  {format_share(point.efficiency):>10}  "
            f"{point.step.total:>8.3f}  {1e3 * point.step.exposed:>12.1f}  {known}"
        )
    return lines


def _doubts(chosen: Chosen) -> list[str]:
    """What the figures leave out, or have not been compared with."""
    config, lines = chosen.config, []
    if config.zero.offload != "none":
        lines.append("The update in host memory, and the copies there and back, are not in these times.")
    if config.train.offload_activations:
        lines.append("Copies of activations to host memory and back are not in these times.")
    if chosen.machine.processes > 1 and config.optimizer.kind not in ("adamw", "sgd", "lion"):
        lines.append(f"What {config.optimizer.kind} sends for its own is not among the messages.")
    if chosen.machine.processes > 1 and config.train.objective in ("dino", "moco"):
        lines.append(f"What train.objective = {config.train.objective} sends for its own is not among the messages.")
    if chosen.machine.on_gpu:
        lines.append(f"Memory is computed from shapes, and has not been compared with a GPU's{chosen.measured}.")
    else:
        lines.append(f"Memory is computed from shapes{chosen.measured}.")
    return lines
