"""Checks and measures this engine on a GPU in one call of under nine minutes.

    python -m benchmarks.gpu_run --out results
    python -m benchmarks.gpu_run --out results --steps smoke kernels

Steps, the most valuable first, since time is short:

smoke    does every operation compile, run and give the right results, and does training run? A minute or less;
         if it fails, the figures of the others mean little
kernels  the operations against their peers: all of ViT-H/14 in bf16, then those of other models
train    whole training steps of ViT-H/14 against peers
tuning   the fastest launch parameters, as far as time allows
tests    the kernel tests; last, since they compile thousands of kernels, and `smoke` has run the one size that counts

A step gets its share of the remaining time, and later steps gain what it does not need. A step that fails or runs out
of time keeps its partial results and does not stop the others. The folder has three files, rewritten after every step:
`summary.json` (versions, what ran, how it ended), `report.md` (the tables, and the ends of the logs) and
`results.tar.gz` (everything: raw figures, pictures, logs), which unpacks in `benchmarks/results/`.

Needs torch, triton and numpy; every peer that is installed takes part. `--wheels` takes a folder of wheels for a
machine without a network, as `make wheels` fills it.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from fastvit_engine.files import atomic_write

ROOT = Path(__file__).parent.parent
PYTHON = [sys.executable, "-m"]
MINUTES = 8.6  # for everything
PATIENCE = 15  # seconds between Ctrl-C and the end: for the report of what was measured until then
STARTING = 20  # seconds until a program looks at its clock
GPU_LOST = 3  # the tuner's exit code if another process can continue

NEEDED = ("torch", "triton", "numpy")
# What is not done without a package.
WANTED = {
    "pydantic": "no training",
    "yaml": "no training (PyYAML)",
    "PIL": "no training (pillow)",
    "cv2": "no training (opencv-python-headless)",
    "simplejpeg": "no training",
    "webdataset": "no training",
    "braceexpand": "no training",
    "deepspeed": "no ZeRO, no `fastvit train`, no FusedAdam of DeepSpeed",
    "tensorboard": "no `fastvit train`",
    "pytest": "no tests",
    "hypothesis": "most kernel tests do not load",
    "xdist": "kernel tests one after the other (pytest-xdist)",
    "timm": "no timm among the peers",
    "transformers": "no transformers among the peers",
    "matplotlib": "no pictures",
    "flash_attn": "no flash-attn 2",
    "flash_attn_interface": "no flash-attn 3",
    "quack": "no QuACK",
    "liger_kernel": "no Liger-Kernel",
    "transformer_engine": "no TransformerEngine",
    "xformers": "no xformers",
    "torchao": "no float8",
    "apex": "no apex (NVIDIA's, built from source)",
}


@dataclass(frozen=True)
class Step:
    """One program."""

    name: str
    share: float  # of the time, in proportion to the shares of the other steps
    command: Callable[[float], list[str]]  # for so many seconds
    again_on: int | None = None  # the exit code that asks for the same command once more


@dataclass(frozen=True)
class Outcome:
    """How a step ended."""

    step: str
    command: list[str]
    exit_code: int | None  # None: it ran out of time
    seconds: float


def steps(folder: Path, dry: bool) -> list[Step]:
    """In order of importance. A dry run is the same on a CPU, with next to nothing to measure."""
    bench, out = [*PYTHON, "fastvit_engine", "bench"], ["--quick", "--out", str(folder)]
    smoke = [*PYTHON, "benchmarks.smoke", "--out", str(folder)]
    tuning = [*PYTHON, "fastvit_kernels.tuning"]
    tests = [*PYTHON, "pytest", "tests/kernels", "-m", "gpu", "-o", "addopts=-ra", "--continue-on-collection-errors"]
    if dry:
        smoke += ["--only", "layer_norm"]
        small = ["--ops", "layer_norm", "--models", "tiny/14@56"]
        return [
            Step("smoke", 24, lambda seconds: [*smoke, "--seconds", f"{seconds - STARTING:.0f}"]),
            Step("kernels", 31, lambda seconds: [*bench, "kernels", *out, *small]),
            Step("train", 24, lambda seconds: [*bench, "train", *out, "--variants", "fastvit"]),
            Step("tuning", 11, lambda seconds: [*tuning, "--dry-run", "--ops", "cross_entropy", "--shapes", "B/16"]),
            Step("tests", 10, lambda seconds: [*tests, "--collect-only", "-q"]),
        ]
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling
        tests += ["-n", str(min(14, os.cpu_count() or 1))]
    tuning += ["--quick", "--out", str(folder / "tuning.json")]
    return [
        Step("smoke", 24, lambda seconds: [*smoke, "--seconds", f"{seconds - STARTING:.0f}"]),
        Step("kernels", 31, lambda seconds: [*bench, "kernels", *out, "--minutes", minutes(seconds - 30)]),
        Step("train", 24, lambda seconds: [*bench, "train", *out, "--minutes", minutes(seconds - 30)]),
        Step("tuning", 11, lambda seconds: [*tuning, "--minutes", minutes(seconds - 15)], GPU_LOST),
        Step("tests", 10, lambda seconds: [*tests, "-q", f"--junit-xml={folder / 'tests.xml'}"]),
    ]


def minutes(seconds: float) -> str:
    """The limit after which a program starts nothing new."""
    return f"{max(seconds, 1) / 60:.2f}"


def limit(step: Step, waiting: Sequence[Step], left: float) -> float:
    """Seconds for a step: its share of the time left for it and all later steps, less the time to stop it."""
    return max(left * step.share / sum(other.share for other in waiting) - PATIENCE, 1)


# ---- running a step


def run(step: Step, seconds: float, folder: Path) -> Outcome:
    """Runs a step with its output in `<step>.log`, as often as it asks for within its limit."""
    start, command = time.monotonic(), step.command(seconds)
    with (folder / f"{step.name}.log").open("w") as log:
        code = attempt(command, log, seconds)
        while code is not None and code == step.again_on:
            left = seconds - (time.monotonic() - start)
            code = attempt(step.command(left), log, left)
    return Outcome(step.name, command, code, round(time.monotonic() - start, 1))


def attempt(command: list[str], log: TextIO, seconds: float) -> int | None:
    """The exit code, or None: after its time a command is stopped as by Ctrl-C, on which it writes what it has."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    try:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
    except OSError as error:
        log.write(f"{error}\n")
        return 127
    try:
        return process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        return None
    finally:
        with suppress(ProcessLookupError):  # whatever it started and left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# ---- what there is


def install(wheels: Path, site: Path) -> list[str]:
    """Installs into `site` what this machine lacks of the wheels, and makes it importable here and in the steps.

    Returns those that cannot be installed. What is there already stays: other packages may need just that version.
    """
    pip = [*PYTHON, "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(site)]
    lacking = [str(path) for path in sorted(wheels.glob("*.whl")) if version(path.name.partition("-")[0]) is None]
    failed = []
    if lacking and subprocess.run([*pip, *lacking]).returncode != 0:  # none of them is installed, if one does not fit
        failed = [Path(wheel).name for wheel in lacking if subprocess.run([*pip, wheel]).returncode != 0]
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    return failed


def dependencies() -> tuple[list[str], list[str]]:
    """(missing packages without which nothing runs, other missing packages and what their absence costs)."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return missing, [f"{name}: {cost}" for name, cost in WANTED.items() if importlib.util.find_spec(name) is None]


def versions() -> dict[str, str | None]:
    packages = ("torch", "triton", "numpy", "deepspeed", "timm", "transformers", "pytest")
    return {
        "python": platform.python_version(),
        "machine": platform.platform(),
        "gpu": gpu(),
        **{package: version(package) for package in packages},
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu() -> str | None:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


# ---- what it leaves


def pack(out: Path, folder: Path, found: dict[str, object], outcomes: Sequence[Outcome]) -> None:
    """Writes the three files from the results so far."""
    summary = found | {"steps": [asdict(outcome) for outcome in outcomes]}
    atomic_write(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    reports = sorted(folder.rglob("*.md"), key=lambda path: path.stat().st_mtime)
    text = [steps_table(outcomes), *(path.read_text() for path in reports), logs(outcomes, folder)]
    atomic_write(out / "report.md", "\n\n".join(text))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(folder, arcname=".")
    atomic_write(out / "results.tar.gz", packed.getvalue())


def steps_table(outcomes: Sequence[Outcome]) -> str:
    lines = ["# Steps", "", "| step | exit code | s |", "|---|---|---:|"]
    for outcome in outcomes:
        code = "not done" if outcome.exit_code is None else outcome.exit_code
        lines.append(f"| {outcome.step} | {code} | {outcome.seconds:.0f} |")
    return "\n".join(lines)


def logs(outcomes: Sequence[Outcome], folder: Path, lines: int = 30) -> str:
    """How the output of every step ends."""
    parts = ["# Logs"]
    for outcome in outcomes:
        written = (folder / f"{outcome.step}.log").read_text(errors="replace").splitlines()
        parts += ["", f"## {outcome.step}", "", "```", *(line[:300] for line in written[-lines:]), "```"]
    return "\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    names = [step.name for step in steps(Path(), dry=False)]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--steps", nargs="+", choices=names, default=names, help="default all; always in this order")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all steps together (default {MINUTES})")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of packages to install if they are missing")
    parser.add_argument("--dry-run", action="store_true", help="the same for a minute on a CPU")
    parsed = parser.parse_args(arguments)
    if parsed.wheels and not any(parsed.wheels.glob("*.whl")):
        parser.error(f"there are no wheels in {parsed.wheels}")
    out = parsed.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder, site = Path(scratch, "results"), Path(scratch, "site")
        folder.mkdir()
        unfit = install(parsed.wheels, site) if parsed.wheels else []
        if unfit:
            print(f"wheels that cannot be installed here: {', '.join(unfit)}")
        missing, poorer = dependencies()
        if missing:
            print(f"not installed, and nothing runs without: {', '.join(missing)}")
            return 2
        print("\n".join(["not installed, and therefore:", *(f"  {line}" for line in poorer)]), flush=True)
        found: dict[str, object] = {"versions": versions(), "not_installed": poorer, "unfit_wheels": unfit}
        outcomes: list[Outcome] = []
        waiting = [step for step in steps(folder, parsed.dry_run) if step.name in parsed.steps]
        while waiting:
            step = waiting[0]
            seconds = limit(step, waiting, 60 * parsed.minutes - (time.monotonic() - start))
            print(f"{step.name}, {seconds:.0f} s at most", flush=True)
            outcomes.append(run(step, seconds, folder))
            print(f"{step.name}: exit code {outcomes[-1].exit_code} after {outcomes[-1].seconds} s", flush=True)
            pack(out, folder, found, outcomes)
            waiting.pop(0)
        print(logs(outcomes, folder) + "\n" + steps_table(outcomes))
    return int(any(outcome.exit_code != 0 for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
