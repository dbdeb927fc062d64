"""`fastvit report`: writes an HTML report of a run and prints its summary."""

import argparse

from fastvit_engine.commands.parser import local_path


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "report",
        help="write an HTML report of a run",
        description="Writes RUN/report.html, one self-contained file: accuracy, curves, sample predictions, and the "
        "configuration of a run that is finished or in progress. Prints a summary.",
        epilog="example:\n  fastvit report runs/quickstart",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", metavar="RUN", type=local_path, help="the folder that fastvit train wrote")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from fastvit_engine.observe.report.recorded_run import load_run
    from fastvit_engine.observe.report.report import write_report
    from fastvit_engine.shown import say

    run = load_run(args.run_folder)
    path = write_report(run)
    say(run.summary())
    say(f"report: {path}")
    return 0
