"""The first things to find out on a GPU, in one call of under nine minutes that needs torch, triton and pytest.

    python -m benchmarks.first_gpu_run --out results

Writes the environment, the kernel tests (log and JUnit file), the measured launch parameters (log and table) and a
summary. A step that fails or outlasts its limit leaves what it had written, and does not stop the others.
"""

import argparse
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).parent.parent
PYTHON = [sys.executable, "-m"]
GPU_LOST = 3  # how the tuning says that another process can go on
PATIENCE = 15  # seconds between Ctrl-C and the end
PACKAGES = ("torch", "triton", "numpy", "pytest", "hypothesis", "timm", "transformers")


@dataclass(frozen=True)
class Step:
    """One command."""

    name: str
    command: list[str]
    seconds: float  # its limit
    again_on: int | None = None  # the exit code that asks for the same command once more


@dataclass(frozen=True)
class Outcome:
    step: str
    command: list[str]
    exit_code: int | None  # None: it outlasted its limit
    seconds: float


def steps(out: Path, dry: bool) -> list[Step]:
    tests = [*PYTHON, "pytest", "tests/kernels", "-m", "gpu", "-o", "addopts=-ra", "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling
        tests += ["-n", str(min(14, os.cpu_count() or 1))]
    tuning = [*PYTHON, "fastvit_kernels.tuning"]
    if dry:  # the same programs, as far as they go without a GPU
        return [
            Step("nvidia-smi", ["nvidia-smi"], 10),
            Step("tests", [*tests, "--collect-only", "-q"], 120),
            Step("tuning", [*tuning, "--dry-run", "--ops", "cross_entropy", "--shapes", "B/16"], 120),
        ]
    return [
        Step("nvidia-smi", ["nvidia-smi"], 10),
        Step("tests", [*tests, "-q", f"--junit-xml={out / 'tests.xml'}"], 215),
        Step("tuning", [*tuning, "--minutes", "4", "--quick", "--out", str(out / "tuning.json")], 260, GPU_LOST),
    ]


def run(step: Step, out: Path) -> Outcome:
    """Runs a step with its output in `<step>.log`, as often as it asks for within its limit."""
    start = time.monotonic()
    with (out / f"{step.name}.log").open("w") as log:
        code = attempt(step.command, log, step.seconds)
        while code is not None and code == step.again_on:
            code = attempt(step.command, log, step.seconds - (time.monotonic() - start))
    return Outcome(step.name, step.command, code, round(time.monotonic() - start, 1))


def attempt(command: list[str], log: TextIO, seconds: float) -> int | None:
    """The exit code, or None: after its time a command is stopped as by Ctrl-C, on which pytest writes its report."""
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


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "machine": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_gpu_run", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--dry-run", action="store_true", help="what of it needs no GPU")
    parsed = parser.parse_args(arguments)
    out = parsed.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for step in steps(out, parsed.dry_run):
        print(f"{step.name}: {' '.join(step.command)}", flush=True)
        outcomes.append(run(step, out))
        print(f"{step.name}: exit code {outcomes[-1].exit_code} after {outcomes[-1].seconds} s", flush=True)
        summary = {"versions": versions(), "steps": [asdict(outcome) for outcome in outcomes]}
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    for outcome in outcomes:
        print("\n".join([f"--- {outcome.step}", *(out / f"{outcome.step}.log").read_text().splitlines()[-40:]]))
    return int(any(outcome.exit_code != 0 for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
