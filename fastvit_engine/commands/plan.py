"""`fastvit plan`: says what a run would need and what the engine would choose, without starting it."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from fastvit_engine.commands.loading import loading_pytorch
from fastvit_engine.commands.recipe import add_init, add_recipe, settings_of, with_weights
from fastvit_engine.errors import UserError
from fastvit_engine.shown import say
from fastvit_engine.sizing.gpus import GPU_MEMORY_GIB

if TYPE_CHECKING:
    from fastvit_engine.config import Config
    from fastvit_engine.sizing.defaults import Chosen
    from fastvit_engine.sizing.memory import Memory

_NODE_LINES = 8  # numbers of nodes that are shown one by one


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", purpose: str) -> None:
    parser = commands.add_parser(
        "plan",
        help=purpose,
        description="Says how much memory a run needs under each ZeRO stage, which settings the engine would choose\n"
        "and why, how the global batch is split, on fewer nodes too, and how long training would take. Needs neither\n"
        "GPU nor data.",
        epilog="example:\n  fastvit plan vit_h14_jft --gpus 64 --gpus-per-node 8 --gpu H100 --mfu 0.4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe(parser)
    add_init(parser)
    parser.add_argument("--gpus", metavar="N", type=int, required=True, help="GPUs of the whole job")
    parser.add_argument("--gpus-per-node", metavar="N", type=int, help="default: 8, or all if there are fewer")
    parser.add_argument("--gpu", choices=list(GPU_MEMORY_GIB), default="H100", help="their model (default: H100)")
    parser.add_argument("--gpu-memory", metavar="GIB", type=float, help="of each GPU (default: that of the model)")
    parser.add_argument("--mfu", metavar="SHARE", type=float, default=0.4, help="assumed, of 1 (default: 0.4)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from fastvit_engine.config import load_config

    if args.gpus < 1:
        raise UserError(f"--gpus is {args.gpus}: at least 1")
    per_node = args.gpus_per_node or min(args.gpus, 8)
    if per_node < 1 or args.gpus % per_node:
        raise UserError(f"--gpus-per-node {per_node} does not divide --gpus {args.gpus}: every node has as many")
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu is {args.mfu:g}: a share above 0 and up to 1, such as 0.4")
    gib = args.gpu_memory or GPU_MEMORY_GIB[args.gpu]
    if gib <= 2:
        raise UserError(f"--gpu-memory is {gib:g} GiB: too little for any training")
    resolved = load_config(args.recipe, settings_of(args))
    with loading_pytorch():
        from fastvit_engine.sizing.defaults import Machine, candidates, choose
        from fastvit_engine.train.estimate import training_time

    config = with_weights(resolved).config
    machine = Machine(args.gpus, per_node, int(gib * 2**30), on_gpu=True)
    options = candidates(config, machine)
    chosen = choose(config, machine)
    time = training_time(chosen, args.gpu, args.mfu, config.data.epoch_samples)
    fewer = _on_fewer_nodes(config, chosen, args.gpu, args.mfu)
    rows = [
        {"stage": row.stage, "largest_micro_batch": row.micro_batch if row.fits else None, "memory": memory}
        for row in options
        for memory in [_memory_at(chosen, row.stage)]
    ]
    if args.json:
        print(json.dumps({**_as_json(args, chosen, rows, time), "nodes": fewer}, indent=1))
    else:
        say(_as_text(args, chosen, rows, time, fewer))
    return 0


def _memory_at(chosen: "Chosen", stage: int) -> "Memory":
    """At another stage, with the micro-batch that was chosen."""
    from fastvit_engine.sizing.defaults import choose

    zero = chosen.config.zero.model_copy(update={"stage": stage})
    return choose(chosen.config.model_copy(update={"zero": zero}), chosen.machine).memory


def _on_fewer_nodes(config: "Config", chosen: "Chosen", gpu: str, mfu: float) -> list[dict[str, Any]]:
    """What every number of nodes, up to that of the job, would make of the same recipe."""
    from dataclasses import replace

    from fastvit_engine.data.stream.batch_split import split_batch
    from fastvit_engine.sizing.defaults import choose
    from fastvit_engine.train.estimate import images_per_second

    machine, per_node = chosen.machine, chosen.machine.processes_per_node
    rows: list[dict[str, Any]] = []
    for nodes in range(machine.processes // per_node, 0, -1):
        row: dict[str, Any] = {"nodes": nodes, "gpus": nodes * per_node}
        try:
            there = choose(config, replace(machine, processes=nodes * per_node))
        except UserError as error:
            rows.append({**row, "problem": str(error)})
            continue
        split = split_batch(there.config, there.machine.processes)
        row |= {
            "zero_stage": there.config.zero.stage,
            "largest_share": split.largest_share,
            "smallest_share": split.smallest_share,
            "micro_batch_size": split.micro_batch_size,
            "accumulation_steps": split.accumulation_steps,
            "images_per_second": images_per_second(there, gpu, mfu, config.data.epoch_samples),
        }
        rows.append(row)
    return rows


def _as_json(
    args: argparse.Namespace, chosen: "Chosen", rows: list[dict[str, Any]], time: dict[str, Any]
) -> dict[str, Any]:
    from dataclasses import asdict

    from fastvit_engine.data.stream.batch_split import split_batch
    from fastvit_engine.engine.build import deepspeed_config

    split = split_batch(chosen.config, chosen.machine.processes)
    stages = [
        {
            **row,
            "memory": {**asdict(row["memory"]), "total": row["memory"].total},
            "fits": row["memory"].total <= chosen.machine.usable,
        }
        for row in rows
    ]
    return {
        "gpus": args.gpus,
        "gpu": args.gpu,
        "gpus_per_node": chosen.machine.processes_per_node,
        "gpu_memory": chosen.machine.memory,
        "gpu_memory_usable": chosen.machine.usable,
        "stages": stages,
        "zero_stage": chosen.config.zero.stage,
        "micro_batch_size": split.micro_batch_size,
        "accumulation_steps": split.accumulation_steps,
        **chosen.record(),
        "deepspeed": deepspeed_config(chosen.config, split),
        "samples_per_epoch": chosen.config.data.epoch_samples,
        "assumed_mfu": args.mfu,
        **time,
    }


def _as_text(
    args: argparse.Namespace,
    chosen: "Chosen",
    rows: list[dict[str, Any]],
    time: dict[str, Any],
    fewer: list[dict[str, Any]],
) -> str:
    from fastvit_engine.data.stream.batch_split import split_batch
    from fastvit_engine.models import full_title, parameter_count
    from fastvit_engine.observe.units import counted, format_bytes, format_count
    from fastvit_engine.train.estimate import describe_split, describe_time

    config, machine = chosen.config, chosen.machine
    split = split_batch(config, machine.processes)
    nodes = machine.processes // machine.processes_per_node
    parts = ["weights", "gradients", "optimizer", "average", "buffers", "update", "activations", "work"]
    parts = [part for part in parts if part != "average" or config.ema.decay is not None]
    together = " + ".join(part for part in parts if part not in ("update", "activations", "work"))
    together += " + max(update, activations + work)"
    parts += ["host"] if config.zero.offload != "none" else []
    table = [["ZeRO", *parts, "together", "", "largest micro-batch"]]
    for row in rows:
        memory = row["memory"]
        mark = "fits" if memory.total <= machine.usable else "too much"
        mark += ", chosen" if row["stage"] == config.zero.stage else ""
        figures = [f"{getattr(memory, part) / 2**30:.1f}" for part in [*parts, "total"]]
        table.append([str(row["stage"]), *figures, mark, str(row["largest_micro_batch"] or "none")])
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    marked = len(parts) + 2  # the column of words, which stand to the left
    lines = [
        "  "
        + "  ".join(
            cell.ljust(width) if column == marked else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
    longest = max(len(f"{choice.key} = {choice.value}") for choice in chosen.choices)
    choices = [
        "  " + f"{choice.key} = {str(choice.value).lower()}".ljust(longest) + f"  {choice.reason}"
        for choice in chosen.choices
    ]
    share = "" if nodes == 1 else f" in {nodes} nodes"
    parameters = parameter_count(config.model, config.pretraining)
    if config.pretraining is not None:
        added = parameters - parameter_count(config.model)
        with_head = f", {format_count(added)} of them for train.objective = {config.train.objective} only"
    else:
        hidden = " and its hidden layer (head: mlp)" if config.model.head == "mlp" else ""
        with_head = f" with a head for {counted(config.model.num_classes, 'class', 'classes')}{hidden}"
    text = [
        f"{full_title(config.model)}, {format_count(parameters)} parameters{with_head}, "
        f"{config.train.precision}, on {machine.processes} x {args.gpu}{share}: "
        f"{format_bytes(machine.usable)} of {format_bytes(machine.memory)} of each GPU for the model",
        "",
        f"GiB of each GPU at a micro-batch of {split.micro_batch_size} images (together = {together})",
        *lines,
        "",
        "settings",
        *choices,
        "",
        describe_split(chosen),
        *_describe_subset(config),
        *_describe_packing(config),
        *describe_time(time, args.gpu, args.mfu),
    ]
    if len(fewer) > 1:
        text += ["", "on other numbers of nodes", *_nodes_table(fewer)]
    text.append(f"Memory is computed from shapes, and has not been compared with a GPU's{chosen.measured}.")
    return "\n".join(text)


def _describe_subset(config: "Config") -> list[str]:
    """How many samples an epoch has, if it has not all of them."""
    data = config.data
    if data.subset is None:
        return []
    samples = f"{data.subset} of the samples" if data.epoch_samples is None else f"{data.epoch_samples:,} samples"
    return [f"data          an epoch is {samples}, data.subset = {data.subset}"]


def _describe_packing(config: "Config") -> list[str]:
    """How many patches an image is taken to have: nobody has looked at the proportions of the images."""
    most, least = config.packing.max_patches, config.packing.min_patches
    if most is None:
        return []
    drawn = f"{most}" if least is None else f"{(least + most) / 2:g} (drawn from {least} to {most})"
    return [f"packing       {drawn} patches per image, an upper bound: rows and columns of patches are rounded down"]


def _nodes_table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each number of nodes; of many, the highest ones and every half."""
    from fastvit_engine.train.estimate import describe_shares

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
