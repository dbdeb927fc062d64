"""`fastvit stacks`: asks the processes of a run in progress for their stack traces."""

import argparse
import sys

from fastvit_engine.errors import UserError
from fastvit_engine.shown import say


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", purpose: str) -> None:
    parser = commands.add_parser(
        "stacks",
        help=purpose,
        description="Asks every process of a run, on whatever machines, for the Python stack traces of its threads,\n"
        "which appear in RUN/stacks. The run continues.",
        epilog="example:\n  fastvit stacks runs/b16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", metavar="RUN", help="the folder that fastvit train writes; path or URL")
    parser.add_argument(
        "--wait", metavar="SECONDS", type=float, default=30.0, help="how long to wait for the processes (default: 30)"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from fastvit_engine.observe.events import read_events
    from fastvit_engine.observe.owner_record import holder_of
    from fastvit_engine.observe.run_folder import WORKING_FOLDERS, run_folder

    run = run_folder(args.run_folder)
    starts = [event for event in read_events(run) if event["event"] == "start" and "world_size" in event]
    if not starts and run.url is not None:
        raise UserError(
            f"no process of {run} has a working folder here, in {run.path}: run this on a machine of the run, as the "
            f"same user and with the same {WORKING_FOLDERS}"
        )
    if not starts:
        raise UserError(f"{run} is not the folder of a run that has started: give the folder that fastvit train names")
    if holder_of(run) is None:
        raise UserError(f"nobody works on {run}: it has no process whose stack traces could be written")

    from fastvit_engine.distributed.stacks import collect_stacks  # which loads PyTorch

    processes = int(starts[-1]["world_size"])  # type: ignore[typeddict-item]
    files = collect_stacks(run, processes, args.wait)
    if not files:
        raise UserError(
            f"no process of {run} has answered within {args.wait:g} s: it is not running, or runs on a machine "
            "that does not share this folder"
        )
    for file in files:
        say(str(file))
    if len(files) < processes:
        print(f"fastvit: {processes - len(files)} of {processes} processes have not answered", file=sys.stderr)
    return 0
