"""`fastvit train`."""

import argparse
from pathlib import Path

from fastvit_engine.commands.recipe import add_recipe
from fastvit_engine.errors import UserError


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "train",
        help="pretrain a model",
        description="Pretrains the model of a recipe: on every GPU of this machine, on CPU processes where it has\n"
        "none, or as one rank of the job that torchrun, srun or deepspeed started.",
        epilog="example:\n  fastvit train vit_b16_i21k --set data.train=shards/ --out runs/b16 --resume auto",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe(parser)
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
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from fastvit_engine import launch
    from fastvit_engine.config import load_config
    from fastvit_engine.observe.run_folder import RunFolder
    from fastvit_engine.rendezvous import check_rendezvous
    from fastvit_engine.train.loop import train
    from fastvit_engine.train.preflight import preflight

    resolved = load_config(args.recipe, args.set)
    out = args.out or Path("runs") / resolved.config.name
    resume = args.resume == "auto"
    if launch.launched_by_cluster():
        check_rendezvous()
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
