"""Finds launch parameters for one GPU: candidates are compiled, checked, measured against the default, chosen between.

Each operation lists its cases in a `tuning.py` beside its kernels: which choice, for which sizes, among which
candidates. Everything that needs the GPU is asked of a `Machine`; the rules below do not.
"""

import hashlib
import importlib
import importlib.metadata
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastvit_kernels import table as tables
from fastvit_kernels.dispatch import Gpu
from fastvit_kernels.table import Entry, Table, Tunable
from fastvit_kernels.tuning.codegen import PACKAGE

HALF = torch.bfloat16  # what is trained in
LEAST_GAIN = 0.01  # a candidate that is not at least this much faster is not worth leaving the default for
ROUNDS, QUICK_ROUNDS = 40, 12
CONFIRMATIONS = 50  # equal runs of what is to be used: a race between instructions shows in few runs of many
ROUNDINGS = 8  # by how many roundings of its dtype a result may differ from the default's
FLOAT32_ERROR = 1e-4  # the same for float32 results, which are sums of thousands of numbers in another order


@dataclass(frozen=True)
class Model:
    """A Vision Transformer in training, from which the sizes of its launches follow."""

    name: str
    patch: int
    width: int
    heads: int
    batch: int = 64
    image: int = 224

    @property
    def tokens(self) -> int:
        return 1 + (self.image // self.patch) ** 2


MODELS = {
    model.name: model
    for model in (
        Model("S/16", 16, 384, 6),
        Model("B/16", 16, 768, 12),
        Model("L/16", 16, 1024, 16),
        Model("H/14", 14, 1280, 16),
        Model("So400m/14", 14, 1152, 16),
        Model("g/14", 14, 1408, 16),
        Model("G/14", 14, 1664, 16),
    )
}
OPS = ("attention", "layer_norm", "gemm", "patch_embed", "cross_entropy", "fp8")  # those with most to gain first


@dataclass(frozen=True)
class Case:
    """One choice: launch parameters for one size."""

    name: str
    tunable: Tunable
    key: tuple  # the arguments of the choice, without the GPU
    candidates: Sequence[Any]  # what to try beside the default
    inputs: Callable[..., tuple]  # (device=...) -> random inputs; on the meta device to compile
    launch: Callable[..., object]  # of these inputs: what is timed; returns tensors
    kernels: tuple[str, ...]  # those that the parameters are for

    def options(self, gpu: Gpu) -> list[Any]:
        """The default, then the candidates that differ from it."""
        default = self.tunable.default(*self.key, gpu)
        return [default, *(candidate for candidate in dict.fromkeys(self.candidates) if candidate != default)]


def cases(ops: Sequence[str], models: Sequence[str], gpu: Gpu, words: Sequence[str] = ()) -> list[Case]:
    """In order of importance: one model after the other, each with its operations. What they share comes once.

    Of `words`, if there are any, a case must have one in its name.
    """
    found: dict[tuple, Case] = {}
    for model in models:
        for op in sorted(ops, key=OPS.index):
            for case in importlib.import_module(f"fastvit_kernels.{op}.tuning").cases(MODELS[model], gpu):
                found.setdefault((case.tunable.kernel, case.key), case)
    return [case for case in found.values() if not words or any(word in case.name for word in words)]


class Machine(Protocol):
    """The GPU, as far as the search needs it."""

    gpu: Gpu
    device: torch.device
    cache_bytes: int  # of L2

    def obstacle(self, case: Case, option: Any) -> str | None:
        """Why the compiler rules this option out, or None."""

    def measure(self, launches: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
        """Milliseconds of each launch, in each round."""

    def check_alive(self) -> None:
        """Raises RuntimeError if an error has made the GPU useless to this process."""


class GpuLost(RuntimeError):
    """A candidate broke the GPU for this process; another process can continue."""


@dataclass(frozen=True)
class Trial:
    """What became of one case."""

    case: str
    default: str
    chosen: str
    default_ms: float
    ms: float
    noise: float
    discarded: dict[str, str]  # candidate -> reason


@dataclass(frozen=True)
class Unmeasured:
    """A case without a trial."""

    case: str
    reason: str


def tune(
    cases: Sequence[Case],
    machine: Machine,
    table: Table,
    path: Path,
    *,
    rounds: int = ROUNDS,
    seconds: float = math.inf,
    report: Callable[[Trial | Unmeasured, int, float], None] = lambda *_: None,
    clock: Callable[[], float] = time.monotonic,
) -> Table:
    """Adds an entry for each case to the table and writes it to `path` after each; cases it has already are left out.

    Stops when another case would probably outlast `seconds`. Choices made are in force while the next are measured.
    `report` gets what became of each case, how many are left, and for how many seconds.
    Raises GpuLost where no further case can be measured by this process; the case is passed over when `tune` is called
    again.
    """
    missing = [case for case in cases if not known(table, case)]
    start = clock()
    for done, case in enumerate(missing):
        average = (clock() - start) / max(done, 1)
        outcome: Trial | Unmeasured
        if clock() - start + average > seconds:
            break
        try:
            with tables.using(table):
                trial, entry = try_case(case, machine, rounds)
            others = [e for e in table.entries if (e.kernel, e.where) != (entry.kernel, entry.where)]
            table, outcome = replace(table, entries=(*others, entry)), trial
        except CannotRun as error:
            outcome = Unmeasured(case.name, str(error))
        except GpuLost as error:
            tables.save(replace(table, failed={**table.failed, identity(case): str(error)}), path)
            raise
        tables.save(table, path)
        left = len(missing) - done - 1
        report(outcome, left, left * (clock() - start) / (done + 1))
    return table


def known(table: Table, case: Case) -> bool:
    """Whether the table has an answer for this case, by the kernels as they are now."""
    where, source = case.tunable.where(case.key), source_hash(case.tunable)
    measured = any((e.kernel, e.where, e.source) == (case.tunable.kernel, where, source) for e in table.entries)
    return measured or identity(case) in table.failed


def identity(case: Case) -> str:
    return f"{case.tunable.kernel} {case.tunable.where(case.key)} {source_hash(case.tunable)}"


def source_hash(tunable: Tunable) -> str:
    op = tunable.default.__module__.split(".")[1]
    files = sorted((PACKAGE / op).glob("*kernels.py")) + sorted((PACKAGE / op / "kernels").glob("*.py"))
    library = f"{tunable.library} {installed(tunable.library)}".encode() if tunable.library else b""
    return hashlib.sha256(b"".join([*(file.read_bytes() for file in files), library])).hexdigest()[:12]


def installed(library: str) -> str:
    """Its version, or "" without it."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""


class CannotRun(RuntimeError):
    """Not even the default runs, so there is nothing to compare with, or nothing can be measured."""


def try_case(case: Case, machine: Machine, rounds: int) -> tuple[Trial, Entry]:
    """Compiles, checks and measures the options of a case, and chooses."""
    torch.manual_seed(0)
    options, discarded = case.options(machine.gpu), {}
    default, *candidates = options
    machine.obstacle(case, default)  # waits until it is compiled; there is nothing to use in its place
    try:
        inputs = case.inputs(device=machine.device)
        expected = run(case, default, inputs)
    except Exception as error:
        alive(machine, f"{case.name}, default {describe(default)}: {first_line(error)}")
        raise CannotRun(f"the default {describe(default)} does not run: {first_line(error)}") from error
    usable = [default]
    for candidate in candidates:
        reason = machine.obstacle(case, candidate)
        if reason is None:
            try:
                reason = difference(run(case, candidate, inputs), expected, run(case, candidate, inputs))
            except Exception as error:
                alive(machine, f"{case.name}, candidate {describe(candidate)}: {first_line(error)}")
                reason = first_line(error)
        if reason is None:
            usable.append(candidate)
        else:
            discarded[describe(candidate)] = reason
    del expected

    try:
        sets = [inputs, *(case.inputs(device=machine.device) for _ in range(sets_beyond_cache(inputs, machine) - 1))]
        # the default once more, last: how far apart two measurements of the same thing are
        times = machine.measure([launcher(case, option, sets) for option in (*usable, default)], rounds)
    except Exception as error:
        alive(machine, f"{case.name}, measuring: {first_line(error)}")
        raise CannotRun(f"it cannot be measured: {first_line(error)}") from error
    times = [[milliseconds / len(sets) for milliseconds in round_] for round_ in times]
    best, noise = choose(times)
    while best and (reason := instability(case, usable[best], inputs)):
        discarded[describe(usable.pop(best))] = reason
        times = [[*round_[:best], *round_[best + 1 :]] for round_ in times]
        best, noise = choose(times)
    default_ms, ms = (statistics.median(round_[i] for round_ in times) for i in (0, best))
    use = usable[best]._asdict()
    where = case.tunable.where(case.key)
    entry = Entry(case.tunable.kernel, where, use, default_ms, ms, noise, source_hash(case.tunable))
    chosen = describe(usable[best]) if best else "default"
    return Trial(case.name, describe(default), chosen, default_ms, ms, noise, discarded), entry


def choose(times: Sequence[Sequence[float]]) -> tuple[int, float]:
    """Which option to take, 0 for the default, and the noise that a gain has to exceed.

    `times` are rounds of all options, the default first and once more last. Options are compared with the default of
    the same round, so that a slow moment of the machine counts for both. Noise is the greatest of: the quartile
    distance of those ratios for the best option, how far the second default is from the first, and `LEAST_GAIN`.
    """
    ratios = [[round_[i] / round_[0] for round_ in times] for i in range(len(times[0]))]
    medians = [statistics.median(column) for column in ratios]
    best = min(range(len(medians) - 1), key=medians.__getitem__)
    low, _, high = statistics.quantiles(ratios[best if best else -1], n=4)
    noise = max(high - low, abs(medians[-1] - 1), LEAST_GAIN)
    return (best if medians[best] < 1 - noise else 0), noise


def run(case: Case, option: Any, inputs: tuple) -> list[Tensor]:
    """What one launch returns. Memory that it leaves unwritten is NaN."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills empty tensors with NaN
    try:
        with warnings.catch_warnings(action="ignore"), case.tunable.forcing(option):
            outputs: Any = case.launch(*inputs)
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    return [output for output in outputs if output is not None and output.numel()]


def launcher(case: Case, option: Any, sets: Sequence[tuple]) -> Callable[[], None]:
    def launch() -> None:
        with case.tunable.forcing(option):
            for inputs in sets:
                case.launch(*inputs)

    return launch


def sets_beyond_cache(inputs: tuple, machine: Machine) -> int:
    """How many sets of inputs to go round, so that each has left L2 before its turn comes again."""
    size = sum(tensor.nbytes for tensor in inputs if isinstance(tensor, Tensor))
    return 1 + math.ceil(machine.cache_bytes / max(size, 1))


def difference(ours: Sequence[Tensor], expected: Sequence[Tensor], again: Sequence[Tensor]) -> str | None:
    """Why results are wrong, or None: they must be near the default's, and the same bits when computed again."""
    if not all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)):
        return "wrong: two runs differ, or it is not a number"
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        if a.shape != b.shape:
            return f"wrong: result {i} has shape {list(a.shape)}"
        a, b, eps = a.float(), b.float(), torch.finfo(b.dtype).eps
        tolerance = FLOAT32_ERROR if eps < FLOAT32_ERROR else ROUNDINGS * eps
        error = ((a - b).abs() / (b.abs() + b.square().mean().sqrt() + torch.finfo(torch.float32).tiny)).max().item()
        if not error <= tolerance:
            return f"wrong: result {i} differs from the default's by {error:.2g}, allowed {tolerance:.2g}"
    return None


def instability(case: Case, option: Any, inputs: tuple) -> str | None:
    """Says so if one of many runs gives other bits than the first."""
    first = run(case, option, inputs)
    for number in range(2, CONFIRMATIONS + 1):
        if not all(torch.equal(a, b) for a, b in zip(first, run(case, option, inputs), strict=True)):
            return f"wrong: run {number} of {CONFIRMATIONS} differs from the first"
    return None


def alive(machine: Machine, happened: str) -> None:
    try:
        machine.check_alive()
    except RuntimeError as error:
        raise GpuLost(happened) from error


def describe(option: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in option._asdict().items())


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
