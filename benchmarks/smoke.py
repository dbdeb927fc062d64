"""Checks in a minute that everything runs on this GPU and gives right results, before anything is measured.

    python -m benchmarks.smoke --out DIR
    python -m benchmarks.smoke --out DIR --only attention block

Runs each operation forward and backward at the size of ViT-H/14 in bf16, judged against float64, and `fastvit train`
for a few steps of a tiny model on images of noise. Each has its own process, because a kernel that fails
ends its process, and several run at the same time, because the CPU compiles. CUDA waits for every
kernel, so that an error is raised where the kernel was launched; its traceback is shown with the values of our own
frames. On a CPU: the same, small and without kernels.
"""

import argparse
import faulthandler
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.judge import Judge
from benchmarks.kernels import Selection, pick_known, select
from benchmarks.machine import ROOT, pick_device
from benchmarks.registry import OURS, Case, Unusable
from fastvit_engine.cli import main as fastvit
from fastvit_engine.files import atomic_write

SKIPPED = "skipped: "
AT_ONCE = 12  # processes: the largest take 8 GB of a GPU's memory, most far less
LAST_WORDS = 5  # seconds from a process's stack traces to its end
TRAININGS = {f"train ZeRO-{stage}": stage for stage in (1, 3)}
TRAINING_NEEDS = (
    "pydantic",
    "yaml",
    "PIL",
    "cv2",
    "simplejpeg",
    "webdataset",
    "braceexpand",
    "deepspeed",
    "tensorboard",
)
SETTINGS = (
    "model={name: Ti/16, image_size: 64, num_classes: 1000}", "train.global_batch_size=16", "train.duration=5 steps",
    "train.log_every=1", "schedule.warmup=1 steps", "data.eval=null", "evaluate.every=null",
)  # fmt: skip
OUR_FRAMES = ("fastvit_kernels", "triton/runtime")  # whose values say which kernel ran, on what, launched how


@dataclass(frozen=True)
class Outcome:
    """How one check ended."""

    name: str
    exit_code: int | None  # None: it ran out of time
    seconds: float
    log: str

    @property
    def said(self) -> str:
        """The last line."""
        return next((line for line in reversed(self.log.splitlines()) if line.strip()), "nothing")

    @property
    def word(self) -> str:
        if self.exit_code is None:
            return "**not done**"
        if self.exit_code == 0 and self.said.startswith(SKIPPED):
            return "skipped"
        return "ok" if self.exit_code == 0 else f"**exit code {self.exit_code}**"


def cases() -> dict[str, Case]:
    """Our operations at the first size of all, which the kernels are designed for."""
    found = select(Selection(quick=True), pick_device())
    first = found[0]
    return {
        case.op.name: case
        for case in found
        if (case.shape, case.batch) == (first.shape, first.batch) and any(p.name == OURS for p in case.op.providers)
    }


# ---- one process


def check(name: str) -> None:
    """Runs one check in this process: prints the outcome, or raises."""
    if name in TRAININGS:
        check_training(TRAININGS[name])
    else:
        check_operation(cases()[name])


def check_operation(case: Case) -> None:
    provider = next(provider for provider in case.op.providers if provider.name == OURS)
    judge = Judge(case, case.inputs(seed=0))
    bound = provider.make(case)(judge.inputs)
    start = time.perf_counter()
    verdict = judge.judge(provider, bound)
    first = time.perf_counter() - start
    start = time.perf_counter()
    judge.judge(provider, bound)
    again = time.perf_counter() - start
    print(f"{case.id}: {verdict}; {first:.1f} s with compiling, {again:.2f} s without, judging included")
    if not verdict.passes:
        raise ArithmeticError(f"wrong: {verdict}")


def check_training(stage: int) -> None:
    """`fastvit train` as a user starts it."""
    absent = [name for name in TRAINING_NEEDS if importlib.util.find_spec(name) is None]
    if absent:
        raise Unusable(f"not installed: {', '.join(absent)}")
    from benchmarks.data import write_shards

    with tempfile.TemporaryDirectory() as folder:
        shards, run = write_shards(Path(folder, "shards"), 32, height=96, width=128), Path(folder, "run")
        settings = [*SETTINGS, f"data.train={shards}", f"zero.stage={stage}"]
        settings.append(f"train.precision={'bf16' if torch.cuda.is_available() else 'fp32'}")
        words = ["train", "quickstart", "--out", str(run), "--max-restarts", "0"]
        exit_code = fastvit([*words, *(word for setting in settings for word in ("--set", setting))])
        if exit_code != 0:
            raise RuntimeError(f"fastvit train ended with exit code {exit_code}")


def explain(error: BaseException) -> str:
    """The whole traceback, and behind it what the variables of our own frames and of Triton's launcher held."""
    lines = traceback.format_exception(error)
    for frame, line in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        if any(part in code.co_filename for part in OUR_FRAMES):
            lines.append(f"{code.co_filename}:{line}, {code.co_name}:\n")
            lines += [f"    {name} = {brief(value)}\n" for name, value in frame.f_locals.items()]
    return "".join(lines)


def brief(value: Any) -> str:
    """No number of a tensor is read: after an error the GPU may not answer."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)}, strides {list(value.stride())}, {value.device}"
    if isinstance(value, tuple | list):
        return f"({', '.join(brief(part) for part in value[:12])})"
    try:
        return repr(value)[:300]
    except Exception as error:
        return f"<{type(error).__name__}>"


def worker(name: str) -> int:
    try:
        check(name)
    except Unusable as error:
        print(f"{SKIPPED}{error}")
    except Exception as error:
        print(explain(error))
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
        return 1
    return 0


# ---- the supervisor of these processes


def run(name: str, deadline: float) -> Outcome:
    start = time.monotonic()
    seconds = max(deadline - start, 0)
    command = [sys.executable, "-m", "benchmarks.smoke", "--worker", name, "--seconds", str(seconds)]
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
        "CUDA_LAUNCH_BLOCKING": "1",
    }
    if torch.cuda.is_available() and name not in TRAININGS:
        environment["FASTVIT_KERNELS"] = "triton"  # what cannot run its kernel must say so
    with tempfile.TemporaryFile() as log:  # not a pipe, which what a process leaves behind would keep open
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        return Outcome(name, code, time.monotonic() - start, log.read().decode(errors="replace"))


def run_all(names: Sequence[str], deadline: float) -> Iterator[Outcome]:
    """As they end."""
    with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool:
        for future in as_completed([pool.submit(run, name, deadline) for name in names]):
            yield future.result()


def markdown(outcomes: Sequence[Outcome]) -> str:
    lines = ["# Does it run?", "", "| what | outcome | s | last line |", "|---|---|---:|---|"]
    for outcome in outcomes:
        said = outcome.said.replace("|", "\\|")
        lines.append(f"| {outcome.name} | {outcome.word} | {outcome.seconds:.0f} | {said} |")
    for outcome in outcomes:
        if outcome.exit_code != 0:
            lines += ["", f"## {outcome.name}", "", "```", outcome.log.strip()[-20_000:], "```"]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoke", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for smoke.md")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="operations, or 'train ZeRO-1' (default: all)")
    parser.add_argument(
        "--seconds", type=float, default=300, help="checks still running then are stopped (default 300)"
    )
    parser.add_argument("--worker", metavar="NAME", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.worker:
        faulthandler.dump_traceback_later(max(parsed.seconds - LAST_WORDS, 1))  # of a check that is not done
        return worker(parsed.worker)
    deadline = time.monotonic() + parsed.seconds
    known = [*cases(), *TRAININGS]
    pick_known("check", parsed.only or (), known)
    outcomes: list[Outcome] = []
    for outcome in run_all(parsed.only or known, deadline):
        outcomes.append(outcome)
        print(f"{outcome.name}: {outcome.word} after {outcome.seconds:.0f} s: {outcome.said}", flush=True)
        if outcome.exit_code != 0:
            print(outcome.log, flush=True)
        if parsed.out:
            parsed.out.mkdir(parents=True, exist_ok=True)
            atomic_write(parsed.out / "smoke.md", markdown(outcomes))
    return int(any(outcome.exit_code != 0 for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
