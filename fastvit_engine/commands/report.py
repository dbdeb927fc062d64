"""`fastvit report`: writes an HTML report of a run and prints its summary."""

import argparse
import tempfile
from pathlib import Path


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "report",
        help="write an HTML report of a run",
        description="Writes RUN/report.html, one self-contained file: accuracy, curves, sample predictions, and the "
        "configuration of a run that is finished or in progress. Prints a summary.",
        epilog="examples:\n  fastvit report runs/quickstart\n  fastvit report s3://bucket/run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", metavar="RUN", help="the folder that fastvit train wrote; path or URL")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from fastvit_engine.checkpoint.records import Records
    from fastvit_engine.observe.report.recorded_run import load_run
    from fastvit_engine.observe.report.report import write_report
    from fastvit_engine.observe.run_folder import RunFolder, run_folder
    from fastvit_engine.shown import say
    from fastvit_engine.storage.remote_files import write

    folder = run_folder(args.run_folder)
    with tempfile.TemporaryDirectory(prefix="fastvit-report-") as copy:
        if folder.url is not None:  # not its working folder, where the run may be in progress
            folder = RunFolder(Path(copy), folder.url)
            Records(folder).fetch()
        run = load_run(folder)
        path = write_report(run)
        if folder.url is not None:
            write(f"{folder.url}/{path.name}", path.read_bytes())
    say(run.summary())
    say(f"report: {folder.describe(path)}")
    return 0
