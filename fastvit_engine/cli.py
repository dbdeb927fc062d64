"""The `fastvit` command."""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fastvit_engine import __version__
from fastvit_engine.errors import UserError
from fastvit_engine.launch import speaks_for_all


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, or 2 after printing one sentence about bad input."""
    args = _parser().parse_args(arguments)
    try:
        return int(args.run(args))
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        if importlib.util.find_spec((error.name or "").partition(".")[0]) is not None:
            raise  # an installed package that misses a part of itself is not the user's doing
        return _fail(f"this command needs the package '{error.name}': pip install 'fastvit-engine[train]'")


def _fail(message: str) -> int:
    if speaks_for_all():
        print(f"fastvit: error: {message}", file=sys.stderr, flush=True)
    if "RANK" in os.environ:
        os._exit(2)  # peers may be inside a collective, and an orderly exit of the interpreter would wait for them
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastvit", description="Pretrain Vision Transformers at scale.")
    parser.add_argument("--version", action="version", version=f"fastvit-engine {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_config(commands)
    from fastvit_engine.data.cli import add_data_commands
    from fastvit_engine.observe.cli import add_report_command

    add_data_commands(commands)
    add_report_command(commands)
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a name from `fastvit config list`, or a YAML file")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override one value: --set train.precision=fp32"
    )


def _add_train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "train",
        help="pretrain a model",
        description="Pretrains the model of a recipe on every GPU of this machine, on CPU processes where it has none, "
        "or as one rank of the job that torchrun, deepspeed or SLURM started.",
        epilog="example: fastvit train vit_b16_i21k --set data.train='shards/train-*.tar' --out runs/b16 --resume auto",
    )
    _add_recipe(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, help="run folder (default: runs/<name of the recipe>)")
    parser.add_argument(
        "--resume",
        choices=["auto", "never"],
        default="never",
        help="auto: continue the run that the folder holds; never (default): refuse a folder that holds one",
    )
    parser.add_argument(
        "--cpu-processes",
        metavar="N",
        type=int,
        default=1,
        help="processes to start where there is no GPU (default: 1)",
    )
    parser.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    from fastvit_engine import launch
    from fastvit_engine.config import load_config
    from fastvit_engine.observe.run_folder import RunFolder
    from fastvit_engine.train.loop import train
    from fastvit_engine.train.preflight import preflight

    resolved = load_config(args.recipe, args.set)
    out = args.out or Path("runs") / resolved.config.name
    resume = args.resume == "auto"
    if launch.launched_by_cluster():
        train(resolved, out, resume=resume)
        return 0

    if args.cpu_processes < 1:
        raise UserError(f"--cpu-processes is {args.cpu_processes}: at least 1")
    processes = launch.processes_here(args.cpu_processes)
    start = preflight(resolved.config, RunFolder(out), processes, resume=resume)
    if start.step == start.total_steps:
        print(start.message)
        return 0
    overrides = [word for override in args.set for word in ("--set", override)]
    command = ["train", args.recipe, "--out", str(out), "--resume", args.resume, *overrides]
    return launch.run_processes(command, processes)


def _add_config(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("config", help="list recipes, or show one as it will be used")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="the recipes that come with the engine").set_defaults(run=_list_recipes)
    show = actions.add_parser(
        "show",
        help="every value of a recipe and where it comes from",
        epilog="example: fastvit config show vit_h14_jft --set zero.stage=2",
    )
    _add_recipe(show)
    show.set_defaults(run=_show_config)


def _list_recipes(args: argparse.Namespace) -> int:
    from fastvit_engine.config import RECIPES, recipe_names

    for name in recipe_names():
        first_line = (RECIPES / f"{name}.yaml").read_text().partition("\n")[0]
        print(f"{name:<24} {first_line.removeprefix('# ')}")
    return 0


def _show_config(args: argparse.Namespace) -> int:
    from fastvit_engine.config import load_config

    print(load_config(args.recipe, args.set).to_yaml(with_origins=True), end="")
    return 0
