"""Operations against their peers: checked, raced, written down.

The measurement runs in its own process, because a kernel that fails on a GPU ends its process. That process
notes in a journal what it is about to do and what it has done; if it dies, another one continues after the
provider that was its end.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.apex_detection import first_line
from benchmarks.custom import with_providers
from benchmarks.judge import Judge, poison, run
from benchmarks.launches import launches
from benchmarks.machine import ROOT, describe, measure_ceilings, pick_device, sensors
from benchmarks.ops import all_ops
from benchmarks.peers import version
from benchmarks.registry import (
    DTYPES,
    OURS,
    Bound,
    Case,
    Provider,
    Unusable,
    Work,
    all_cases,
)
from benchmarks.report import is_ours
from benchmarks.shapes import CPU_SHAPES, GPU_SHAPES, QUICK_CPU_SHAPES, Shape
from benchmarks.timing import Clock, Racer, Times, race
from fastvit_engine.config.near import near_names
from fastvit_kernels.dispatch import INTERPRETED

SILENCE = 900  # seconds without a word after which the measuring process counts as stuck: compilers take their time
VERY_SLOW = ("max-autotune", "deepspeed")  # compile for a minute or more: not in a quick run on a GPU either
SETS = 3  # of inputs, that take turns


@dataclass(frozen=True)
class Effort:
    """How long one case is measured."""

    rounds: int
    seconds: float  # for the race of one case


@dataclass(frozen=True)
class Selection:
    """What to measure; empty means all."""

    ops: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    own: tuple[str, ...] = ()  # FILE.py:FUNCTION, kernels of the user's
    dtypes: tuple[str, ...] = ()
    quick: bool = False
    minutes: float | None = None  # no case is started after them


@dataclass
class Progress:
    """What earlier measuring processes have done."""

    done: set[str] = field(default_factory=set)  # cases
    fatal: set[tuple[str, str]] = field(default_factory=set)  # (case, provider) at which a process ended


def shapes(device: torch.device, quick: bool) -> tuple[Shape, ...]:
    if device.type == "cuda":
        return GPU_SHAPES
    return QUICK_CPU_SHAPES if quick else CPU_SHAPES


def effort(device: torch.device, quick: bool) -> Effort:
    if device.type == "cuda":
        return Effort(rounds=10, seconds=4) if quick else Effort(rounds=40, seconds=20)
    return Effort(rounds=5, seconds=2) if quick else Effort(rounds=15, seconds=20)


def select(selection: Selection, device: torch.device) -> list[Case]:
    """The cases of a selection. ValueError for a name that there is not."""
    ops, models = all_ops(), shapes(device, selection.quick)
    pick_known("operation", selection.ops, [op.name for op in ops])
    ops = with_providers(ops, selection.ops, selection.own)
    refuse_sizes_of_elsewhere(selection, device, models)
    pick_known("size", selection.models, [shape.name for shape in models])
    pick_known("dtype", selection.dtypes, list(DTYPES))
    pick_known("provider", selection.providers, sorted({p.name for op in ops for p in op.providers}))
    dtypes = selection.dtypes or (("bf16",) if device.type == "cuda" else ("fp32",))
    cases = all_cases(
        [op for op in ops if not selection.ops or op.name in selection.ops],
        [shape for shape in models if not selection.models or shape.name in selection.models],
        [DTYPES[name] for name in dtypes],
        device,
    )
    if not cases:
        raise ValueError(f"{', '.join(selection.ops)} is not measured at {', '.join(selection.models)}: see --list")
    return cases


def refuse_sizes_of_elsewhere(selection: Selection, device: torch.device, models: Sequence[Shape]) -> None:
    """A size that is measured on a GPU only, or in one of quick and full runs only, is refused with the way to it."""
    here = [shape.name for shape in models]
    for name in selection.models:
        if name in here:
            continue
        if any(shape.name == name for shape in shapes(device, not selection.quick)):
            way = "is in a quick run only: add --quick"
            if selection.quick:
                way = "is not in a quick run: leave out --quick"
        elif device.type != "cuda" and any(shape.name == name for shape in GPU_SHAPES):
            way = "is measured on a GPU only"
        else:
            continue
        raise ValueError(f"the size '{name}' {way}; here there are {', '.join(map(repr, here))}")


def pick_known(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            near = near_names(name, known)
            others = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(map(repr, known))}"
            raise ValueError(f"there is no {what} '{name}' to measure here; {others}")


# ---- one case


def measure_case(
    case: Case,
    clock: Clock,
    ceilings: Mapping[str, Any],
    *,
    effort: Effort,
    begin: Callable[[str], None] = lambda name: None,
    skip: Callable[[Provider], str | None] = lambda provider: None,
) -> dict[str, Any]:
    """Checks every provider of a case, races those that are right, and reports on each.

    `begin` hears what is about to run; `skip` says why a provider is left out, or None.
    """
    torch._dynamo.reset()  # a case is compiled for its own sizes, and not counted as a recompilation
    sets = [case.inputs(seed) for seed in range(SETS)]
    begin("plain")
    judge = Judge(case, sets[0])
    rows, racers = [], {}
    for provider in case.op.providers:
        row: dict[str, Any] = {"provider": provider.name, "version": provider.package and version(provider.package)}
        row |= {"own": True} if provider.own else {}
        rows.append(row)
        reason = skip(provider)
        if reason is not None:
            row |= {"status": "skipped", "reason": reason}
            continue
        begin(provider.name)
        try:
            binder = provider.make(case)
            poison(case, sets[0])
            with launches() as launched:
                verdict = judge.judge(provider, binder(sets[0]))
            if is_ours(row) and not launched:
                row["path"] = "reference" if case.device.type == "cpu" else "no Triton kernel"
            elif is_ours(row) and INTERPRETED:
                row["path"] = "interpreted"
            row["error"] = {"of": verdict.result, "measure": verdict.measure, "error": verdict.error,
                            "allowed": verdict.bound}  # fmt: skip
            if not verdict.passes:
                row |= {"status": "wrong", "reason": str(verdict)}
                continue
            bounds = [binder(inputs) for inputs in sets]
            row["peak_bytes"] = peak_bytes(case, bounds[0], judge)
            row["backend"] = backends(case, bounds[0], judge)
            racers[provider.name] = Racer(bounds, judge.cotangents)
            row |= {"status": "ok"} | ({"precision": provider.precision} if provider.precision else {})
        except Unusable as error:
            row |= {"status": "skipped", "reason": str(error)}
        except Exception as error:  # one provider that fails must not end the others
            row |= {"status": "failed", "reason": first_line(error)}
            check_alive(case)
    begin("race")
    before = sensors(case.device)
    times = race(racers, clock, rounds=effort.rounds, seconds=effort.seconds) if racers else {}
    fill_in_times(case, rows, times, ceilings)
    return {
        "case": case.id,
        "op": case.op.name,
        "title": case.op.title,
        "model": case.shape.name if case.op.per_model else None,
        "batch": case.batch,
        "tokens": case.shape.tokens,
        "head_dim": case.shape.head_dim,
        "dtype": str(case.dtype).removeprefix("torch."),
        "exact": judge.exact_dtype,
        "work": {name: vars(work) for name, work in works(case).items()},
        "best_peer": best_peers(rows, times),
        "providers": rows,
        "sensors": [before, sensors(case.device)],
    }


def works(case: Case) -> dict[str, Work]:
    found = dict(case.op.work(case))
    if len(found) > 1:
        found["both"] = Work(sum(w.flops for w in found.values()), sum(w.bytes for w in found.values()))
    return found


def fill_in_times(
    case: Case, rows: Sequence[dict[str, Any]], times: Mapping[str, Times], ceilings: Mapping[str, Any]
) -> None:
    """Adds to each row that raced its times, rates and share of the ceiling, and the ratios.

    Ours has one to the best peer, and each peer has how many times as fast as it ours is.
    """
    best = best_peers(rows, times)
    for row in rows:
        if row["provider"] not in times:
            continue
        own = times[row["provider"]]
        row["host_ms"] = 1e3 * sum(own.host[name] for name in own.device if name != "both")
        row["passes"] = {}
        for name, work in works(case).items():
            row["passes"][name] = summarize(own.device[name], work, ceilings, case.dtype)
            if is_ours(row) and best.get(name):
                row["passes"][name] |= {"times_as_fast": over(times[best[name]], own, name), "as": best[name]}
            elif not is_ours(row) and OURS in times:
                row["passes"][name] |= {"fastvit_times_as_fast": over(own, times[OURS], name)}


def over(slow: Times, fast: Times, name: str) -> list[float]:
    """How many times as fast one is as another, round by round."""
    return spread([a / b for a, b in zip(slow.device[name], fast.device[name], strict=True)])


def summarize(
    milliseconds: Sequence[float], work: Work, ceilings: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    """Median and quartiles, and the rate of what the roofline says is scarce, with its share of what was measured."""
    seconds = 1e-3 * median(milliseconds)
    peak = ceilings["matmul_flops"].get(str(dtype).removeprefix("torch."))
    floors = {"bytes": work.bytes / ceilings["copy_bytes_per_second"]}
    if peak:
        floors["flops"] = work.flops / peak
    scarce = max(floors, key=floors.__getitem__)
    return {
        "ms": spread(milliseconds),
        "rounds": len(milliseconds),
        "scarce": scarce,
        "per_second": getattr(work, scarce) / seconds,
        "share_of_ceiling": floors[scarce] / seconds,
    }


def spread(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3


def best_peers(rows: Sequence[Mapping[str, Any]], times: Mapping[str, Times]) -> dict[str, str]:
    """By pass: the fastest that is not ours, is right, and computes in the case's own precision."""
    peers = [
        row["provider"]
        for row in rows
        if row["provider"] in times and not is_ours(row) and "precision" not in row and "own" not in row
    ]
    passes = {name for peer in peers for name in times[peer].device}
    return {name: min(peers, key=lambda peer: median(times[peer].device[name])) for name in sorted(passes)}


def peak_bytes(case: Case, bound: Bound, judge: Judge) -> int | None:
    """Peak memory of one call with its gradients, beyond its inputs; GPU only."""
    if case.device.type != "cuda":
        return None
    torch.cuda.synchronize(case.device)
    torch.cuda.reset_peak_memory_stats(case.device)
    before = torch.cuda.memory_allocated(case.device)
    run(bound, judge.cotangents)
    return torch.cuda.max_memory_allocated(case.device) - before


def backends(case: Case, bound: Bound, judge: Judge) -> list[str]:
    """What ran longest: kernels on a GPU, operators on a CPU."""
    on_gpu = case.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])
    with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
        run(bound, judge.cotangents)
    events = profile.key_averages()
    if on_gpu:
        kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and e.self_device_time_total]
        return [e.key for e in sorted(kernels, key=lambda e: -e.self_device_time_total)[:4]]
    return [e.key for e in sorted(events, key=lambda e: -e.self_cpu_time_total)[:4]]


def check_alive(case: Case) -> None:
    """Ends this process if an error has made the GPU unusable for it; another one continues."""
    if case.device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(case.device)
        torch.cuda.empty_cache()
    except RuntimeError as error:
        sys.exit(f"the GPU is lost to this process: {first_line(error)}")


# ---- the measuring process


def measure_all(selection: Selection, progress: Progress, deadline: float, journal: Callable[[dict], None]) -> None:
    device = pick_device()
    cases = select(selection, device)
    clock, dtypes = Clock(device), sorted({case.dtype for case in cases}, key=str)
    ceilings = measure_ceilings(clock, dtypes, selection.quick)
    journal({"ceilings": ceilings})
    for case in cases:
        if case.id in progress.done:
            continue
        if time.time() > deadline:
            journal({"unmeasured": case.id})
            continue
        journal({"begin": [case.id, "inputs"]})

        def skip(provider: Provider, case: Case = case) -> str | None:
            if (case.id, provider.name) in progress.fatal:
                return "ended the process that measured it"
            if selection.providers and provider.name not in selection.providers and not provider.own:
                return "not asked for"
            if selection.quick and provider.slow and (device.type == "cpu" or provider.name.endswith(VERY_SLOW)):
                return "compiles for long: not in a quick run"
            return None

        def begin(name: str, case: Case = case) -> None:
            journal({"begin": [case.id, name]})

        try:
            row = measure_case(case, clock, ceilings, effort=effort(device, selection.quick), begin=begin, skip=skip)
        except Exception as error:  # inputs, plain formulation or race: the next case may fare better
            check_alive(case)
            row = {"case": case.id, "failed": first_line(error)}
        journal({"case": row})
    journal({"ceilings": measure_ceilings(clock, dtypes, selection.quick)})  # has the machine slowed down?


def worker(arguments: Sequence[str] | None = None) -> None:
    """`python -m benchmarks.kernels ORDER JOURNAL`: what `measure` starts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("order", type=Path)
    parser.add_argument("journal", type=Path)
    parsed = parser.parse_args(arguments)
    order = json.loads(parsed.order.read_text())
    chosen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in order["selection"].items()}
    selection = Selection(**chosen)
    progress = Progress(set(order["done"]), {(case, provider) for case, provider in order["fatal"]})
    with parsed.journal.open("a") as file:

        def journal(entry: dict) -> None:
            file.write(json.dumps(entry) + "\n")
            file.flush()

        measure_all(selection, progress, order["deadline"], journal)


# ---- its supervisor


def measure(selection: Selection, report: Callable[[str], None]) -> dict[str, Any]:
    """Measures a selection on this machine; `report` hears of each case. ValueError for a name that there is not."""
    device = pick_device()
    cases = select(selection, device)
    environment = describe(device)
    start = time.time()
    deadline = start + 60 * selection.minutes if selection.minutes else 1e18
    progress, record = Progress(), Record(report, len(cases), start)
    with tempfile.TemporaryDirectory() as folder:
        while True:
            try:
                exit_code, log = run_worker(selection, progress, deadline, Path(folder), record)
            except KeyboardInterrupt:
                record.error = "it was interrupted"
                break
            progress.done |= {entry["case"] for entry in record.cases}
            if exit_code == 0:
                break
            if record.last is None or record.last in progress.fatal:
                record.error = f"the measuring process ended with exit code {exit_code}: {log[-2000:]}"
                break
            report(f"the measuring process ended at {' '.join(record.last)}; another one continues")
            progress.fatal.add(record.last)
            case, stage = record.last
            if stage in ("inputs", "plain", "race"):
                record.cases.append({"case": case, "failed": f"ended the process that measured it ({stage})"})
                progress.done.add(case)
    return {
        "suite": "kernels",
        "quick": selection.quick,
        "environment": environment,
        "seconds": time.time() - start,
        "cases": record.cases,
        "unmeasured": record.unmeasured,
        "ceilings": record.ceilings,
        "error": record.error,
    }


class Record:
    """What measuring processes wrote into their journal."""

    def __init__(self, report: Callable[[str], None], cases: int, start: float) -> None:
        self.cases: list[dict[str, Any]] = []
        self.unmeasured: list[str] = []
        self.ceilings: list[dict[str, Any]] = []
        self.last: tuple[str, str] | None = None  # the case and provider begun last, unless the case is done
        self.error: str | None = None
        self._report, self._count, self._start, self._read = report, cases, start, 0

    def take_in(self, journal: Path) -> None:
        lines = journal.read_text().split("\n")[:-1]  # what follows the last line break is half a line
        for line in lines[self._read :]:
            entry = json.loads(line)
            if "begin" in entry:
                self.last = (entry["begin"][0], entry["begin"][1])
            elif "ceilings" in entry:
                self.ceilings.append(entry["ceilings"])
            elif "unmeasured" in entry:
                self.unmeasured.append(entry["unmeasured"])
            else:
                self.last = None
                self.cases.append(entry["case"])
                seconds = time.time() - self._start
                self._report(f"{entry['case']['case']} ({len(self.cases)} of {self._count} cases, {seconds:.0f} s)")
        self._read = len(lines)


def run_worker(
    selection: Selection, progress: Progress, deadline: float, folder: Path, record: Record
) -> tuple[int, str]:
    """Exit code and log of one measuring process; a stuck one is ended."""
    order = {
        "selection": vars(selection),
        "done": sorted(progress.done),
        "fatal": sorted(progress.fatal),
        "deadline": deadline,
    }
    (folder / "order").write_text(json.dumps(order))
    journal = folder / "journal"
    journal.touch()
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.kernels", str(folder / "order"), str(journal)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdout=log,
            stderr=log,
        )
        try:
            while process.poll() is None:
                time.sleep(0.2)
                record.take_in(journal)
                if time.time() - journal.stat().st_mtime > SILENCE:
                    process.kill()
        finally:
            process.kill()
            process.wait()
        record.take_in(journal)
        log.seek(0)
        return process.returncode, log.read()


if __name__ == "__main__":
    worker()
