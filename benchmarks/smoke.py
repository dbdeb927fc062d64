"""Checks in minutes that everything runs on this GPU and gives right results, before anything is measured.

    python -m benchmarks.smoke --out DIR
    python -m benchmarks.smoke --out DIR --only attention block
    TRITON_PTXAS_PATH=.../ptxas python -m benchmarks.smoke --out DIR --assembler "ptxas 13.3"

Runs each operation forward and backward, judged against float64: at the size of ViT-H/14 in bf16 and in float32, at
that of B/16, whose head dimension is 64, attention also at 256 and 577 tokens, what users run under autocast, and MLPs
with products in QuACK, if it is installed.
Then each is repeated, and every result must be the same to the last bit, since a race passes a comparison of a few
runs. And `fastvit train` takes a few steps of a tiny model on images of noise.

Each check has its own process, because a kernel that fails ends its process, and several run at the same time, because
the CPU compiles. CUDA waits for every kernel, so that an error is raised where the kernel was launched; its traceback
is shown with the values of our own frames. With --out, smoke-ASSEMBLER.json has what became of each check, and
`smoke.md` compares all assemblers that have a file there, by check and by kernel. On a CPU: the same, small and
without kernels.
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
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.judge import Judge, poison
from benchmarks.judge import run as results_of
from benchmarks.kernels import Selection, pick_known, select
from benchmarks.launches import launches
from benchmarks.machine import ROOT, pick_device
from benchmarks.registry import OURS, Bound, Case, Unusable
from benchmarks.smoke_record import BUNDLED, IN_QUACK, KERNELS, SKIPPED, TRAININGS, Outcome, save
from fastvit_engine.cli import main as fastvit
from fastvit_kernels import dispatch, libraries

AT_ONCE = 12  # processes: the largest take 8 GB of a GPU's memory, most far less
REPETITIONS = 200  # a race of one in a hundred passes 50 of them more often than not
LAST_WORDS = 5  # seconds from a process's stack traces to its end
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
class Check:
    """An operation of ours at one size, in one dtype or under autocast to bf16; with products in QuACK or without."""

    case: Case
    autocast: bool = False
    quack: bool = False

    @property
    def name(self) -> str:
        return self.case.id + (" autocast" if self.autocast else "") + (IN_QUACK if self.quack else "")


SMALL_SHAPE = {"cpu": "Ti/16@64", "cuda": "B/16"}
OTHER_TOKENS = ("H/14 gap", "H/14@336")
IN_FP32 = ("attention", "layer_norm", "layer_norm_mlp", "patch_embed", "soft_cross_entropy")
AT_HEAD_DIM_64 = ("attention", "block")
UNDER_AUTOCAST = ("layer_norm", "patch_embed", "block")
WITH_GELU = ("layer_norm_mlp", "layer_norm_mlp_tanh", "block")


def checks() -> dict[str, Check]:
    """By name, the most important first: all operations at the size that the kernels are designed for, then others."""
    device = pick_device()
    large = [Check(case) for case in ours(select(Selection(quick=True), device))]
    first = large[0].case
    found = [check for check in large if check.case.shape == first.shape and check.case.batch == first.batch]
    found += [
        check
        for check in large
        if (check.case.shape.name == SMALL_SHAPE[device.type] and check.case.op.name in AT_HEAD_DIM_64)
        or (check.case.shape.name in OTHER_TOKENS and check.case.op.name == "attention")
    ]
    full = ours(select(Selection(quick=True, models=(first.shape.name,), dtypes=("fp32",)), device))
    largest = {case.op.name: case for case in reversed(full)}
    found += [Check(largest[name]) for name in IN_FP32]
    found += [Check(largest[name], autocast=True) for name in UNDER_AUTOCAST]
    found += [
        Check(case, quack=True)
        for case in (check.case for check in large)
        if case.op.name in WITH_GELU and case.dtype != torch.float32
        if (case.shape, case.batch) == (first.shape, first.batch)
    ]
    by_name: dict[str, Check] = {}
    for check in found:
        by_name.setdefault(check.name, check)
    return by_name


def ours(cases: Sequence[Case]) -> list[Case]:
    return [case for case in cases if any(provider.name == OURS for provider in case.op.providers)]


# ---- one process


def check(name: str, repetitions: int) -> None:
    """Runs one check in this process: prints the outcome, or raises."""
    if name in TRAININGS:
        check_training(TRAININGS[name])
    elif checks()[name].quack:
        if (reason := libraries.quack_obstacle(dispatch.arch_here())) is not None:
            raise Unusable(reason)
        with dispatch.using("triton,gemm=quack"):
            check_operation(checks()[name], repetitions)
    else:
        check_operation(checks()[name], repetitions)


def check_operation(chosen: Check, repetitions: int) -> None:
    case = chosen.case
    provider = next(provider for provider in case.op.providers if provider.name == OURS)
    judge = AutocastJudge(case, case.inputs(seed=0)) if chosen.autocast else Judge(case, case.inputs(seed=0))
    bound = provider.make(case)(judge.inputs)
    if chosen.autocast:
        provider = replace(provider, precision=torch.finfo(torch.bfloat16).eps)
        bound = replace(bound, forward=under_autocast(bound, case.device))
    poison(case, judge.inputs)
    start = time.perf_counter()
    with launches() as launched:
        verdict = judge.judge(provider, bound)
    first = time.perf_counter() - start
    print(KERNELS + ", ".join(sorted(launched)))
    if not verdict.passes:
        raise ArithmeticError(f"wrong: {verdict}")
    start = time.perf_counter()
    compare_repetitions(bound, judge, repetitions)
    again = time.perf_counter() - start
    print(f"{verdict}; {first:.1f} s with compiling; {repetitions} repetitions the same to the bit in {again:.1f} s")


def compare_repetitions(bound: Bound, judge: Judge, repetitions: int) -> None:
    """Raises ArithmeticError if one call gives other bits than the first."""
    calls = judge.case.op.checked_call
    first = results_of(bound, judge.cotangents, calls)
    for call in range(repetitions):
        for name, tensor in results_of(bound, judge.cotangents, calls).items():
            if not torch.equal(tensor, first[name]):  # NaN, too, differs from itself
                differing = int((tensor != first[name]).sum())
                raise ArithmeticError(
                    f"not deterministic: {differing} numbers of the {name} differ from the first call's in repetition "
                    f"{call + 1} of {repetitions}"
                )


class AutocastJudge(Judge):
    """For float32 inputs under autocast to bf16: the yardstick is the plain formula under autocast."""

    _computed = 0

    def _plain(self, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        self._computed += 1  # the first is the yardstick, the second exact
        device = self.case.device.type
        with torch.autocast(device, torch.bfloat16) if self._computed == 1 else nullcontext():
            return super()._plain(dtype)


def under_autocast(bound: Bound, device: torch.device) -> Any:
    def forward() -> tuple[torch.Tensor, ...]:
        with torch.autocast(device.type, torch.bfloat16):
            return bound.forward()

    return forward


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


def worker(name: str, repetitions: int = REPETITIONS) -> int:
    try:
        check(name, repetitions)
    except Unusable as error:
        print(f"{SKIPPED}{error}")
    except Exception as error:
        print(explain(error))
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
        return 1
    return 0


# ---- the supervisor of these processes


def run(name: str, deadline: float, repetitions: int = REPETITIONS) -> Outcome:
    start = time.monotonic()
    seconds = max(deadline - start, 0)
    command = [sys.executable, "-m", "benchmarks.smoke", "--worker", name, "--seconds", str(seconds)]
    command += ["--repetitions", str(repetitions)]
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


def run_all(
    names: Sequence[str], deadline: float, *, repetitions: int = REPETITIONS, at_once: int = AT_ONCE
) -> Iterator[Outcome]:
    """As they end."""
    with ThreadPoolExecutor(min(at_once, os.cpu_count() or 1)) as pool:
        for future in as_completed([pool.submit(run, name, deadline, repetitions) for name in names]):
            yield future.result()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoke", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for smoke.md and smoke-ASSEMBLER.json")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="operations, single checks, or 'train ZeRO-1' (default: all)"
    )
    parser.add_argument("--assembler", default=BUNDLED, metavar="NAME", help=f"under which name (default {BUNDLED})")
    parser.add_argument("--operations", action="store_true", help="no training")
    parser.add_argument(
        "--repetitions", type=int, default=REPETITIONS, help=f"calls whose bits must agree (default {REPETITIONS})"
    )
    parser.add_argument("--at-once", type=int, default=AT_ONCE, metavar="N", help=f"processes (default {AT_ONCE})")
    parser.add_argument(
        "--seconds", type=float, default=300, help="checks still running then are stopped (default 300)"
    )
    parser.add_argument("--worker", metavar="NAME", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.worker:
        faulthandler.dump_traceback_later(max(parsed.seconds - LAST_WORDS, 1))  # of a check that is not done
        return worker(parsed.worker, parsed.repetitions)
    deadline = time.monotonic() + parsed.seconds
    chosen = names_of(parsed.only, training=not parsed.operations)
    outcomes: list[Outcome] = []
    for outcome in run_all(chosen, deadline, repetitions=parsed.repetitions, at_once=parsed.at_once):
        outcomes.append(outcome)
        print(f"{outcome.name}: {outcome.word} after {outcome.seconds:.0f} s: {outcome.said}", flush=True)
        if outcome.exit_code != 0:
            print(outcome.log, flush=True)
        if parsed.out:
            save(parsed.out, parsed.assembler, outcomes)
    return int(any(outcome.exit_code != 0 for outcome in outcomes))


def names_of(only: Sequence[str] | None, *, training: bool) -> list[str]:
    """The checks of these operations, or of these names. Raises ValueError for one that there is not."""
    known = checks()
    everything = [*known, *(TRAININGS if training else ())]
    operations = list(dict.fromkeys(check.case.op.name for check in known.values()))
    pick_known("check", only or (), [*operations, *known, *TRAININGS])
    if not only:
        return everything
    return [name for name in (*known, *TRAININGS)
            if name in only or (name in known and known[name].case.op.name in only)]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
