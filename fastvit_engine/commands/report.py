"""`fastvit report`: writes an HTML report of a run, or one that compares several, and prints a summary."""

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fastvit_engine.commands.parser import local_path

if TYPE_CHECKING:
    from fastvit_engine.observe.report.recorded_run import RecordedRun

_AXES = ("steps", "samples", "hours", "flops")  # of observe.report.axes, which loads numpy
_COMPARISON = "comparison.html"
_PAGE = b"<!DOCTYPE html>"  # how a report begins


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", purpose: str) -> None:
    parser = commands.add_parser(
        "report",
        help=purpose,
        description="Writes one self-contained HTML file and prints a summary. Of one run, finished or not:\n"
        "RUN/report.html with accuracy, curves, predictions, incidents and the configuration. Of several:\n"
        f"{_COMPARISON} in the current folder, with curves over each other and the settings that differ.",
        epilog="examples:\n  fastvit report runs/quickstart\n  fastvit report s3://bucket/run\n"
        "  fastvit report runs/b16-* --out b16.html --x hours",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="the folder that fastvit train wrote; path or URL")
    parser.add_argument("--out", metavar="FILE", type=local_path, help="the file to write, on this machine")
    parser.add_argument("--x", choices=_AXES, default=_AXES[0], help="the horizontal axis of the charts; the page can "
                        "change it, too (default: %(default)s)")  # fmt: skip
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.out is not None:
        _check_out(args.out)
    return _report(args) if len(args.runs) == 1 else _compare(args)


def _report(args: argparse.Namespace) -> int:
    from fastvit_engine.observe.report.report import render
    from fastvit_engine.shown import say
    from fastvit_engine.storage.remote_files import write

    run = _load(args.runs[0])
    page, folder = render(run, args.x), run.folder
    if args.out is not None:
        _write(args.out, page)
    elif folder.url is not None:
        write(f"{folder.url}/{folder.report.name}", page.encode())
    else:
        _write(folder.report, page)
    say(run.summary())
    say(f"report: {folder.describe(folder.report) if args.out is None else args.out}")
    return 0


def _compare(args: argparse.Namespace) -> int:
    from fastvit_engine.observe.report.comparison import name_runs, render_comparison
    from fastvit_engine.observe.run_folder import run_folder
    from fastvit_engine.shown import say

    out = Path(_COMPARISON) if args.out is None else args.out
    _check_out(out)
    folders = [run_folder(run) for run in args.runs]
    names = name_runs([str(folder.path.resolve()) if folder.url is None else str(folder) for folder in folders])
    runs = [_load(run) for run in args.runs]
    _write(out, render_comparison(runs, names, [settings_of(run) for run in runs], args.x))
    for name, run in zip(names, runs, strict=True):
        say(f"{name}: {run.summary()}")
    say(f"comparison: {out}")
    return 0


def _load(name: str) -> "RecordedRun":
    """Reads a run; one in an object store through a copy of its records."""
    from fastvit_engine.observe.owner_record import holder_of
    from fastvit_engine.observe.report.recorded_run import load_run
    from fastvit_engine.observe.run_folder import RunFolder, run_folder

    folder = run_folder(name)
    holder = holder_of(folder)
    if folder.url is None:
        return load_run(folder, holder)

    from fastvit_engine.checkpoint.records import Records  # which loads PyTorch

    with tempfile.TemporaryDirectory(prefix="fastvit-report-") as copy:
        fetched = RunFolder(Path(copy), folder.url)  # not its working folder, where the run may be in progress
        Records(fetched).fetch()
        return load_run(fetched, holder)


def settings_of(run: "RecordedRun") -> dict[str, str] | None:
    """The settings of a run; None if they are missing or damaged."""
    import yaml

    from fastvit_engine.config.recipes import parse_yaml
    from fastvit_engine.observe.report.settings import flat_settings

    try:
        content = None if run.config is None else parse_yaml(run.config)
    except yaml.YAMLError:
        return None
    return flat_settings(content) if isinstance(content, dict) else None


def _check_out(path: Path) -> None:
    """Raises UserError for what a page must not replace."""
    from fastvit_engine.errors import UserError

    if path.is_dir():
        raise UserError(f"{path} is a folder: name the file to write, such as {path / _COMPARISON}")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no folder: make it first, or choose another --out")
    if path.exists():
        with open(path, "rb") as file:
            if not file.read(len(_PAGE)) == _PAGE:
                raise UserError(f"{path} exists and is no report: choose another --out")


def _write(path: Path, page: str) -> None:
    from fastvit_engine.errors import UserError
    from fastvit_engine.files import atomic_write

    try:
        atomic_write(path, page)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another --out") from error
