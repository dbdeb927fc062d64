"""`fastvit bench` from its arguments to its files.

A suite is imported when it is measured: a GPU machine may have what the operations need, and nothing that training
needs.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import kernels, readme
from benchmarks.machine import ROOT, pick_device, slug
from benchmarks.ops import all_ops
from benchmarks.plots import draw_kernels, draw_train
from benchmarks.report import aligned, kernels_markdown, train_markdown
from fastvit_engine.errors import UserError
from fastvit_engine.files import atomic_write

RESULTS = Path(__file__).parent / "results"
SUITES = ("kernels", "train", "data", "overhead")
QUICK_PHOTOS, PHOTOS = 32, 300


def run(args: Namespace) -> int:
    """Runs `fastvit bench ACTION`. Raises UserError for unknown names; returns 1 if a result is wrong."""
    if args.action == "readme":
        return readme.update(check=args.check)
    if getattr(args, "list", False):
        return list_kernels(args)
    out = args.out or (None if args.quick else RESULTS)  # a quick run never lands among the results by accident
    folder = out and out / slug(pick_device())
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    names = SUITES if args.action == "all" else (args.action,)
    worst = 0
    for name in names:
        say(f"--- {name}")
        try:
            text, record = MEASURE[name](args, folder)
        except ValueError as error:
            raise UserError(f"fastvit bench {name}: {error}") from error
        except Exception as error:
            if args.action != "all":
                raise
            say(f"{name} failed: {type(error).__name__}: {error}")  # the other suites still run
            worst = 1
            continue
        print(json.dumps(finite(record)) if args.json else shown(name, record, text), flush=True)
        worst = max(worst, int(wrong(record)))
    if folder is not None:
        say(f"results: {folder}")
    return worst


def shown(name: str, record: Mapping[str, Any], text: str) -> str:
    """A suite's report for a terminal."""
    if name == "kernels":
        try:
            from benchmarks.terminal import kernels_text
        except ModuleNotFoundError as error:
            say(f"no table for terminals: {error.name} is not installed (pip install 'fastvit-engine[bench]')")
        else:
            return kernels_text(record)
    return aligned(text)


def list_kernels(args: Namespace) -> int:
    """`fastvit bench kernels --list`."""
    chosen = tuple(args.ops or ())
    try:
        from benchmarks.terminal import listing

        kernels.pick_known("operation", chosen, [op.name for op in all_ops()])
    except ModuleNotFoundError as error:
        raise UserError(f"--list needs {error.name}: pip install 'fastvit-engine[bench]'") from error
    except ValueError as error:
        raise UserError(f"fastvit bench kernels: {error}") from error
    print(listing(all_ops(), kernels.shapes(pick_device(), args.quick), chosen), end="")
    return 0


def wrong(record: Mapping[str, Any]) -> bool:
    """Whether a result of ours or of the user's kernel is wrong or missing, or a loader that is installed failed."""
    if any(row.get("failed") for row in record.get("results", ())):
        return True
    if not (record.get("record_equal", True) and record.get("weights_equal", True)):
        return True
    for case in record.get("cases", ()):
        if "failed" in case:
            return True
        rows = case.get("providers", case.get("variants", ()))
        if any((is_ours(row) or row.get("own")) and row["status"] in ("wrong", "failed") for row in rows):
            return True
    return bool(record.get("error"))


def is_ours(row: Mapping[str, Any]) -> bool:
    return bool(row.get("ours", row.get("provider") == "fastvit"))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---- the suites: each returns its report and its record, and writes both with its pictures if there is a folder


def measure_kernels(args: Namespace, folder: Path | None) -> tuple[str, dict[str, Any]]:
    selection = kernels.Selection(
        ops=names(args, "ops"),
        models=names(args, "models") if args.action == "kernels" else (),
        providers=names(args, "providers"),
        own=names(args, "provider"),
        dtypes=names(args, "dtypes"),
        quick=args.quick,
        minutes=args.minutes,
    )
    record = kernels.measure(selection, say)
    text = kernels_markdown(record)
    write(record, text, folder, draw_kernels)
    return text, record


def measure_train(args: Namespace, folder: Path | None) -> tuple[str, dict[str, Any]]:
    from benchmarks import train
    from benchmarks.data import write_shards

    with tempfile.TemporaryDirectory() as scratch:
        shards = getattr(args, "shards", None) if args.action == "train" else None
        if shards is None and args.quick and not getattr(args, "no_shards", False):  # that this path runs too
            shards = str(write_shards(Path(scratch, "shards"), 64, height=96, width=128))
        selection = train.Selection(
            models=names(args, "models") if args.action == "train" else (),
            variants=names(args, "variants"),
            shards=shards,
            batch=getattr(args, "batch", None),
            quick=args.quick,
            largest_batch=getattr(args, "largest_batch", False),
            control=not getattr(args, "no_control", False),
            minutes=args.minutes,
        )
        record = train.measure(selection, say)
    text = train_markdown(record)
    write(record, text, folder, draw_train)
    return text, record


def measure_data(args: Namespace, folder: Path | None) -> tuple[str, dict[str, Any]]:
    """Loaders of training images, on these shards or on noise."""
    from benchmarks.data import write_shards
    from benchmarks.data_loading.run import FULL, QUICK, bench

    with tempfile.TemporaryDirectory() as scratch:
        shards: str | None = getattr(args, "shards", None) if args.action == "data" else None
        noise, cores = shards is None, os.cpu_count() or 1
        given = args if args.action == "data" else Namespace()
        for name in ("image_size", "workers", "rounds", "repack"):
            if getattr(given, name, None) is not None and getattr(given, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(given, name)}: give at least 1")
        workers = getattr(given, "workers", None) or (min(2, cores) if args.quick else max(2, cores))
        effort = QUICK if args.quick else FULL
        if shards is None:
            photos = QUICK_PHOTOS if args.quick else PHOTOS
            per_shard = -(-photos // (2 * workers))  # WebDataset's readers need a shard per worker
            shards = str(write_shards(Path(scratch, "shards"), photos, per_shard=per_shard))
        text, record = bench(
            shards,
            image_size=getattr(given, "image_size", None) or (64 if args.quick else 224),
            workers=workers,
            effort=effort._replace(rounds=getattr(given, "rounds", None) or effort.rounds),
            repack=getattr(given, "repack", None) or (None if args.quick else 256),
            out=Path(scratch),
            progress=say,
        )
        if noise:
            text = text.replace("# Data loading\n", "# Data loading\n\nThe images are noise, not photos.\n", 1)
        record |= {"suite": "data", "noise": noise, "quick": args.quick}
        stem = write(record, text, folder)
        if folder is not None:
            shutil.copyfile(Path(scratch, "data_bench.png"), folder / f"{stem}.png")
    return text, record


def measure_overhead(args: Namespace, folder: Path | None) -> tuple[str, dict[str, Any]]:
    """The step loop's own cost, `step_overhead`: in its own process, since it changes how memory is allocated."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "benchmarks.step_overhead", "--out", scratch]
        # it is a measurement of CPUs
        hidden = {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            command + ["--quick"] * args.quick, env=os.environ | hidden, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip()[-2000:])
        record = json.loads(Path(scratch, "step_overhead.json").read_text())
        record |= {"suite": "overhead", "quick": args.quick}
        text = Path(scratch, "step_overhead.md").read_text()
        write(record, text, folder)
    return text, record


def measure_faults(args: Namespace, folder: Path | None) -> tuple[str, dict[str, Any]]:
    """A recipe whose processes are killed while it trains."""
    from benchmarks import faults

    for name in ("minutes", "every", "processes"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise UserError(f"--{name} is {value:g}: give more than 0")
    with tempfile.TemporaryDirectory() as scratch:
        record = faults.measure(args, Path(scratch), say)
    text = faults.report(record)
    write(record, text, folder, faults.draw)
    return text, record


Suite = Callable[[Namespace, Path | None], tuple[str, dict[str, Any]]]
MEASURE: dict[str, Suite] = {
    "kernels": measure_kernels,
    "train": measure_train,
    "data": measure_data,
    "overhead": measure_overhead,
    "faults": measure_faults,
}


def names(args: Namespace, key: str) -> tuple[str, ...]:
    return tuple(getattr(args, key, None) or ())


def finite(value: Any) -> Any:
    """With None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(
    record: Mapping[str, Any],
    text: str,
    folder: Path | None,
    draw: Callable[[Mapping[str, Any], Path, str], list[Path]] | None = None,
) -> str:
    """Files of one suite, SUITE-DATE.json, .md and pictures: these last, and only if matplotlib is installed."""
    stem = f"{record['suite']}-{record['environment']['started'][:10]}"
    if folder is None:
        return stem
    atomic_write(folder / f"{stem}.json", json.dumps(finite(record), indent=1, allow_nan=False) + "\n")
    atomic_write(folder / f"{stem}.md", text)
    if draw is not None:
        try:
            paths = draw(record, folder, stem)
        except ModuleNotFoundError as error:
            say(f"no pictures: {error.name} is not installed (pip install 'fastvit-engine[bench]')")
        else:
            pictures = "".join(f"\n![{path.stem}]({path.name})\n" for path in paths if path.suffix == ".png")
            atomic_write(folder / f"{stem}.md", text + pictures)
    return stem
