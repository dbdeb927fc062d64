"""`fastvit plan`: says what a run would need and what the engine would choose, without starting it."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from fastvit_engine.commands.loading import loading_pytorch
from fastvit_engine.commands.plan import options
from fastvit_engine.commands.recipe import add_init, add_recipe, settings_of, with_weights
from fastvit_engine.errors import UserError
from fastvit_engine.shown import say

if TYPE_CHECKING:
    from fastvit_engine.config import Config
    from fastvit_engine.sizing.defaults import Chosen
    from fastvit_engine.sizing.state import Memory
    from fastvit_engine.sizing.step_time import Speed


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", purpose: str) -> None:
    parser = commands.add_parser(
        "plan",
        help=purpose,
        description="Says how much memory a run needs under each ZeRO stage, which settings the engine would choose\n"
        "and why, how the global batch is split, on fewer nodes too, how long training would take and how much of it\n"
        "is communication, and what storage and cores it needs. Needs neither GPU nor data.",
        epilog="examples:\n  fastvit plan vit_h14_jft --gpus 64 --gpu H100 --mfu 0.4\n"
        "  fastvit plan vit_h14_jft --nodes 8 --interconnect ethernet-100 --price 2.5 --out scaling",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe(parser)
    add_init(parser)
    options.add_options(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from fastvit_engine.config import load_config

    options.check(args)
    options.processes_of(args)
    options.memory_gib(args)
    options.interconnect_of(args)
    resolved = load_config(args.recipe, settings_of(args))
    with loading_pytorch():
        from fastvit_engine.sizing.candidates import possible_stages
        from fastvit_engine.sizing.defaults import choose
        from fastvit_engine.sizing.needs import USUAL_SAMPLE, needs_of
        from fastvit_engine.sizing.policies import largest_micro_batch, policies
        from fastvit_engine.sizing.scaling import scaling
        from fastvit_engine.train.estimate import training_time, work_of

    config = with_weights(resolved).config
    machine, speed = options.machine_of(args), options.speed_of(args, config)
    chosen = choose(config, machine)
    time = training_time(chosen, speed, config.data.epoch_samples)
    work = work_of(chosen, config.data.epoch_samples)
    sample = USUAL_SAMPLE if args.sample_kb is None else 1000 * args.sample_kb
    found = {
        "chosen": chosen,
        "stages": [
            {
                "stage": stage,
                "largest_micro_batch": largest_micro_batch(_at(config, stage), machine),
                "memory": _memory_at(chosen, stage),
            }
            for stage in sorted(possible_stages(config))
        ],
        "policies": policies(config, chosen, machine),
        "time": time,
        "speed": speed,
        "needs": needs_of(chosen.config, time["images_per_second"], sample),
        "sample_bytes": sample,
        "assumed_mfu": options.mfu_of(args),
        "cost": _cost(time, machine.processes, args.price),
        "nodes": _on_fewer_nodes(config, chosen, speed, work),
        "scaling": scaling(config, machine, speed, work) if args.out or args.json else [],
    }
    pictures = _draw(args, found) if args.out else []
    if args.json:
        from fastvit_engine.commands.plan.record import as_json

        print(json.dumps(as_json(args.gpu, found), indent=1))
    else:
        from fastvit_engine.commands.plan.text import as_text

        say("\n".join([as_text(args.gpu, found), *(f"wrote {path}" for path in pictures if path.suffix == ".png")]))
    return 0


def _draw(args: argparse.Namespace, found: dict[str, Any]) -> list[Any]:
    from fastvit_engine.models import full_title
    from fastvit_engine.sizing.scaling_figure import draw

    devices = "processes" if args.gpu == options.CPU else f"{args.gpu} GPUs"
    title = f"{full_title(found['chosen'].config.model)}, {found['speed'].interconnect.describe(nodes=2)}"
    args.out.mkdir(parents=True, exist_ok=True)
    return draw(found["scaling"], title, devices, args.out, measured=found["speed"].image.measured)


def _at(config: "Config", stage: int) -> "Config":
    return config.model_copy(update={"zero": config.zero.model_copy(update={"stage": stage})})


def _memory_at(chosen: "Chosen", stage: int) -> "Memory":
    """At another stage, with the micro-batch that was chosen."""
    from fastvit_engine.sizing.candidates import with_train
    from fastvit_engine.sizing.defaults import choose

    there = with_train(_at(chosen.config, stage), micro_batch_trial=False)  # which begins with this micro-batch
    return choose(there, chosen.machine).memory


def _cost(time: dict[str, Any], processes: int, price: float | None) -> dict[str, float | None]:
    """None if the length of the run, or the price of a GPU's hour, is not known."""
    hours = None if time["days"] is None else 24 * time["days"] * processes
    return {"gpu_hours": hours, "price": price, "cost": None if hours is None or price is None else hours * price}


def _on_fewer_nodes(config: "Config", chosen: "Chosen", speed: "Speed", work: float) -> list[dict[str, Any]]:
    """What every number of nodes, up to that of the job, would make of the same recipe."""
    from dataclasses import replace

    from fastvit_engine.data.stream.batch_split import split_batch
    from fastvit_engine.sizing.defaults import choose
    from fastvit_engine.sizing.step_time import images_per_second

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
            "images_per_second": images_per_second(there, speed, work),
        }
        rows.append(row)
    return rows
