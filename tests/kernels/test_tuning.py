"""Launch parameters: how they are looked up, and how the tool chooses them, with a clock in the place of a GPU."""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastvit_kernels
from fastvit_kernels import dispatch, table
from fastvit_kernels.attention.tiling import Tiling, forward_tiling
from fastvit_kernels.dispatch import Gpu
from fastvit_kernels.gemm import config
from fastvit_kernels.table import Entry, Provenance, Table, Tunable, tunable
from fastvit_kernels.tuning import __main__ as tool
from fastvit_kernels.tuning import search
from fastvit_kernels.tuning.codegen import TARGETS, Compiled
from fastvit_kernels.tuning.gpu import Compiler
from fastvit_kernels.tuning.search import Case, GpuLost, Model, Trial, Unmeasured

HOPPER = Gpu("sm_90", 132, "X90")  # one that no file is shipped for
PROVENANCE = Provenance("X90", True, "measured in a test", "2026-01-01", "3.6", "2.11", table.TOOL)
BF16 = torch.bfloat16


def entry(tokens: int, rows: int, head_dim: int = 80, dtype: str = "bfloat16") -> Entry:
    where = {"head_dim": head_dim, "dtype": dtype, "tokens": tokens}
    return Entry("attention_fwd_kernel", where, Tiling(rows, 32, 4, 1)._asdict(), 2.0, 1.0, 0.01, "source")


# Looking up


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA-GeForce-RTX-4090"),
    ],
)
def test_a_gpu_is_named_by_its_model(device: str, name: str) -> None:
    assert table.gpu_name(device) == name


def test_the_nearest_size_is_taken_and_all_else_must_be_equal() -> None:
    entries = (entry(197, 64), entry(257, 32), entry(257, 16, head_dim=64), entry(257, 16, dtype="float16"))
    default = forward_tiling(80, BF16, 257, HOPPER)
    with table.using(Table(PROVENANCE, entries)):
        for tokens, rows in [(257, 32), (197, 64), (98, default.rows), (99, 64), (220, 64), (240, 32), (514, 32)]:
            assert forward_tiling(80, BF16, tokens, HOPPER).rows == rows, tokens
        assert forward_tiling(80, BF16, 515, HOPPER) == default  # more than twice what was measured
        assert forward_tiling(80, BF16, 0, HOPPER) == default
        assert forward_tiling(72, BF16, 257, HOPPER) == forward_tiling.default(72, BF16, 257, HOPPER)
        assert forward_tiling(80, torch.float32, 257, HOPPER) == forward_tiling.default(80, torch.float32, 257, HOPPER)
        for other in (Gpu("sm_90", 132, "H100"), Gpu("sm_90", 132), Gpu("interpreter", 2)):
            assert forward_tiling(80, BF16, 257, other) == forward_tiling.default(80, BF16, 257, other)
    assert forward_tiling(80, BF16, 257, HOPPER) == default


def test_of_several_sizes_the_product_of_ratios_decides() -> None:
    def product(n: int, k: int, faster: bool) -> Entry:
        where = {"product": "gelu", "dtype": "bfloat16", "m": 1000, "n": n, "k": k}
        use = config.Tile(128, 128, 64, 4, 4, 8, beats_cublas=faster)._asdict()
        return Entry("gemm_kernel", where, use, 2.0, 1.0, 0.01, "source")

    with table.using(Table(PROVENANCE, (product(400, 100, True), product(300, 150, False)))):
        assert config.tile("gelu", BF16, 1900, 400, 110, HOPPER).beats_cublas  # 1.9 * 1 * 1.1 against 1.9 * 1.33 * 1.36
        assert not config.tile("gelu", BF16, 1000, 320, 140, HOPPER).beats_cublas
        assert not config.tile("gelu", BF16, 1000, 400, 201, HOPPER).beats_cublas  # one size is too far
        assert not config.tile("plain", BF16, 1000, 400, 100, HOPPER).beats_cublas


def test_a_second_lookup_is_no_search() -> None:
    with table.using(Table(PROVENANCE, (entry(257, 32),))):
        for _ in range(5):
            forward_tiling(80, BF16, 257, HOPPER)
        assert (forward_tiling.chosen.cache_info().misses, forward_tiling.chosen.cache_info().hits) == (1, 4)


def test_every_operation_with_candidates_is_tuned() -> None:
    folders = {path.parent.name for path in table.CONFIGS.parent.parent.glob("*/tuning.py")}
    assert folders == set(search.OPS)


def other_parameters(choice: Tunable, default: Any) -> dict[str, Any]:
    """Launch parameters that are not the default's, without a claim that they would work."""
    use = default._asdict()
    if "provider" in use:
        return {"provider": next(name for name in choice.providers if name != default.provider)}
    return {name: not v if isinstance(v, bool) else 7 if v is None else v + 1 for name, v in use.items()}


def test_a_file_reaches_the_choices_of_all_operations(tmp_path: Path) -> None:
    cases = search.cases(search.OPS, ["H/14", "L/16", "B/16"], HOPPER)
    assert {case.tunable.kernel for case in cases} == set(table.TUNABLES)
    entries = []
    for case in cases:
        use = other_parameters(case.tunable, case.tunable.default(*case.key, HOPPER))
        entries.append(Entry(case.tunable.kernel, case.tunable.where(case.key), use, 2.0, 1.0, 0.01, "source"))
    table.save(Table(PROVENANCE, tuple(entries)), tmp_path / "X90.json")
    loaded = table.load(tmp_path / "X90.json")
    assert loaded == Table(PROVENANCE, tuple(entries), path=tmp_path / "X90.json")
    with table.using(loaded):
        for case, written in zip(cases, entries, strict=True):
            assert case.tunable(*case.key, HOPPER)._asdict() == written.use != case.options(HOPPER)[0]._asdict()
            assert search.known(loaded, case) is False  # of other kernels
        assert config.runs_triton("gelu", BF16, torch.device("cpu"), 64 * 257, 5120, 1280) is False  # not this GPU
        with dispatch.compiling_for(HOPPER):
            assert config.runs_triton("gelu", BF16, torch.device("cpu"), 64 * 257, 5120, 1280) is True


def test_shipped_files_are_of_this_version_and_unmeasured_ones_are_empty() -> None:
    files = sorted(table.CONFIGS.glob("*.json"))
    assert {file.stem for file in files} >= {"A100", "H100", "H200", "MI300X"}
    for file in files:
        shipped = table.load(file)
        assert shipped.provenance.gpu == file.stem and shipped.provenance.tool == table.TOOL
        assert shipped.provenance.note == table.NOTES[shipped.provenance.measured]
        assert not shipped.failed
        assert bool(shipped.entries) == shipped.provenance.measured  # defaults stand in the code, and only there
        for measured in shipped.entries:
            table.check(measured, file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kernel": "fast_kernel"}, "has 'fast_kernel' for head_dim, dtype, tokens, which this version"),
        ({"where": {"head_dim": 80, "tokens": 257}}, "for head_dim, tokens, which this version"),
        ({"where": {"head_dim": 80, "dtype": "bfloat16", "tokens": "257"}}, "tokens must be a whole number, got '257'"),
        ({"use": {"rows": 64}}, "launch parameters must be rows, columns, num_warps, stages, max_registers, got rows"),
        ({"use": Tiling(64, 32, 4, 1)._asdict() | {"rows": "64"}}, "rows must be a whole number, got '64'"),
        (
            {"kernel": "layer_norm", "where": {"width": 8, "dtype": "bfloat16", "branch": False, "rows": 4},
             "use": {"provider": "apex"}},
            "provider must be one of triton, reference, got 'apex'",
        ),
    ],
)  # fmt: skip
def test_entries_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    table.save(Table(PROVENANCE, (replace(entry(257, 64), **change),)), tmp_path / "own.json")
    with table.using(table.load(tmp_path / "own.json")), pytest.raises(ValueError, match=said) as error:
        forward_tiling(80, BF16, 257, HOPPER)
    assert "own.json" in str(error.value)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    program = (
        "import torch; from fastvit_kernels.attention.tiling import forward_tiling;"
        "from fastvit_kernels.dispatch import Gpu;"
        "from fastvit_kernels import table;"
        "print(forward_tiling(80, torch.bfloat16, 257, Gpu('sm_90', 132, 'X90')).rows);"
        "print(table.describe('X90')); forward_tiling(80, torch.bfloat16, 257, Gpu('sm_90', 132, 'H100'))"
    )
    own = tmp_path / "own.json"
    table.save(Table(PROVENANCE, (entry(257, 16),)), own)
    environment = os.environ | {"FASTVIT_TUNING": str(own)}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout.splitlines() == [
        "16",
        f"launch parameters: {own} (FASTVIT_TUNING, measured 2026-01-01 with Triton 3.6: measured in a test)",
    ]
    assert f"ValueError: FASTVIT_TUNING={own} is for X90, but this GPU is H100" in result.stderr


def test_a_file_that_is_no_table_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tuning file .*own.json cannot be read: No such file"):
        table.load(tmp_path / "own.json")
    for content in ("", "{}", "[]", '{"entries": [{}], "failed": {}}', '{"entries": [], "failed": {}, "gpu": "H200"}'):
        (tmp_path / "own.json").write_text(content)
        with pytest.raises(ValueError, match="tuning file .*own.json is not one that fastvit_kernels.tuning wrote"):
            table.load(tmp_path / "own.json")


def test_explain_says_which_file_is_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    shipped = table.load(table.CONFIGS / "H200.json").provenance
    measured = f"measured {shipped.date} with Triton {shipped.triton}" if shipped.measured else "not measured"
    for device, said in [
        ("NVIDIA H200", f"launch parameters: {table.CONFIGS / 'H200.json'} (shipped, {measured}: {shipped.note})"),
        ("NVIDIA T4", "launch parameters: defaults, unmeasured (no file for T4; python -m fastvit_kernels.tuning"),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=device: device)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        with dispatch.compiling_for(HOPPER):
            assert said in fastvit_kernels.explain()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "launch parameters: defaults (no GPU)" in fastvit_kernels.explain()


# Choosing: launches take as long on a clock as their parameters say


class Toy(NamedTuple):
    cost: int
    fault: int = 0


WRONG, POISON, CHANGING, FAILING, LOST, SPILLING, RARELY_WRONG = range(1, 8)


class Clock:
    def __init__(self) -> None:
        self.now, self.drift, self.launches = 0.0, 0.0, 0
        self.rare = 0  # launches of what is rarely wrong

    def __call__(self) -> float:
        return self.now


class FakeGpu:
    """A `search.Machine` on the CPU. The clock goes on by the cost of what is launched, and drifts."""

    gpu, device, cache_bytes = HOPPER, torch.device("cpu"), 0

    def __init__(self, clock: Clock) -> None:
        self.clock, self.lost = clock, False

    def obstacle(self, case: Case, option: Any) -> str | None:
        return "spills registers" if getattr(option, "fault", 0) == SPILLING else None

    def measure(self, launches: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
        return [[self.time(launch) for launch in launches] for _ in range(rounds)]

    def time(self, launch: Callable[[], object]) -> float:
        start = self.clock.now
        launch()
        self.clock.drift += 0.002
        return (self.clock.now - start) * (1 + self.clock.drift)

    def check_alive(self) -> None:
        if self.lost:
            raise RuntimeError("an illegal memory access")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[FakeGpu, list[Case]]]:
    """Makes a fake GPU and cases of a kernel whose default costs 100, with these candidates."""
    monkeypatch.setattr(table, "TUNABLES", dict(table.TUNABLES))
    monkeypatch.setattr(search, "source_hash", lambda choice: "source")

    @tunable(Toy, "toy_kernel", sizes=("size",))
    def choice(size: int, on: Gpu) -> Toy:
        return Toy(100)

    clock = Clock()
    machine = FakeGpu(clock)

    def launch(x: Tensor) -> tuple[Tensor, None]:
        parameters = choice(len(x), HOPPER)
        clock.now += parameters.cost
        clock.launches += 1
        out = torch.empty_like(x)
        if parameters.fault == FAILING:
            raise RuntimeError("out of resources\nmore")
        if parameters.fault == LOST:
            machine.lost = True
            raise RuntimeError("an illegal memory access")
        if parameters.fault == CHANGING:
            return x + clock.launches / 1e4, None
        if parameters.fault == RARELY_WRONG:
            clock.rare += 1
            return x + (clock.rare % 40 == 0) / 1e5, None
        if parameters.fault == POISON:
            out[1:] = x[1:]  # one number is never written
            return out, None
        return x + (1 if parameters.fault == WRONG else 0), None

    def make(*candidates: Toy, sizes: Sequence[int] = (8,)) -> tuple[FakeGpu, list[Case]]:
        def case(size: int) -> Case:
            return Case(
                f"toy {size}", choice, (size,), candidates, lambda device: (torch.ones(size),), launch, ("toy",)
            )

        return machine, [case(size) for size in sizes]

    return make


Make = Callable[..., tuple[FakeGpu, list[Case]]]


def tuned(machine: FakeGpu, cases: Sequence[Case], path: Path, **options: Any) -> tuple[Table, list]:
    outcomes: list[Any] = []
    result = search.tune(
        cases, machine, Table(PROVENANCE), path, rounds=9, report=lambda o, *_: outcomes.append(o), **options
    )
    return result, outcomes


def test_the_fastest_right_candidate_is_chosen_and_looked_up(toy: Make, tmp_path: Path) -> None:
    faults = [Toy(fault, fault) for fault in (WRONG, POISON, CHANGING, FAILING, SPILLING)]  # all faster than right ones
    machine, cases = toy(Toy(100), Toy(90), *faults, Toy(70), Toy(120))
    result, (trial,) = tuned(machine, cases, tmp_path / "out.json")
    assert isinstance(trial, Trial)
    assert trial.chosen == "cost=70 fault=0"
    assert trial.ms / trial.default_ms == pytest.approx(0.7, abs=0.02)
    reasons = [trial.discarded[search.describe(fault)] for fault in faults]
    assert reasons == [
        "wrong: result 0 differs from the default's by 0.5, allowed 0.0001",
        "wrong: two runs differ, or it is not a number",
        "wrong: two runs differ, or it is not a number",
        "RuntimeError: out of resources",
        "spills registers",
    ]
    assert not torch.are_deterministic_algorithms_enabled()
    with table.using(table.load(tmp_path / "out.json")):
        assert cases[0].tunable(8, HOPPER) == Toy(70)
        assert cases[0].tunable(5, HOPPER) == Toy(70)
    assert cases[0].tunable(8, HOPPER) == Toy(100)
    assert table.load(tmp_path / "out.json") == replace(result, path=tmp_path / "out.json")


def test_a_winner_that_is_wrong_in_one_run_of_many_loses(toy: Make, tmp_path: Path) -> None:
    machine, cases = toy(Toy(90), Toy(50, RARELY_WRONG), Toy(70))
    result, (trial,) = tuned(machine, cases, tmp_path / "out.json")
    assert trial.chosen == "cost=70 fault=0" and result.entries[0].use == {"cost": 70, "fault": 0}
    assert trial.ms / trial.default_ms == pytest.approx(0.7, abs=0.02)
    (reason,) = trial.discarded.values()
    assert re.fullmatch(r"wrong: run \d+ of 50 differs from the first", reason)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, None),
        ({"spill_loads": 1, "stack_bytes": 8}, "spills registers (8 bytes of stack)"),
        ({"serialised": 1}, "ptxas serialises its matrix products"),
        ({"hazards": 3}, "3 instructions overwrite registers that a matrix product still reads"),
        ({"shared_bytes": 228 * 1024}, "needs 233472 bytes of shared memory of 232448"),
    ],
)
def test_what_the_compiler_made_can_rule_a_candidate_out(found: dict[str, int], said: str | None) -> None:
    sound = Compiled("op", "case", "kernel", "sm_90", 8, 128, 0, 0, 0, 1024, 20, 7, 0, 0, True)
    compiler = Compiler((), (), TARGETS["sm_90"], 1)
    compiler.compiled = lambda case, option: [sound, replace(sound, **found)]  # type: ignore[method-assign]
    try:
        assert compiler.obstacle(None, None) == said  # type: ignore[arg-type]
    finally:
        compiler.close()


def test_the_default_stays_without_a_clear_win(toy: Make, tmp_path: Path) -> None:
    machine, cases = toy(Toy(101), Toy(200))
    result, (trial,) = tuned(machine, cases, tmp_path / "out.json")
    assert trial.chosen == "default" and result.entries[0].use == {"cost": 100, "fault": 0}


def test_a_gain_must_exceed_the_noise() -> None:
    def rounds(candidate: Sequence[float], again: float) -> list[list[float]]:
        # the machine becomes slower and slower, which must not matter
        return [[1 + r, (1 + r) * c, (1 + r) * again] for r, c in enumerate(candidate)]

    assert search.choose(rounds([0.9] * 8, 1.0)) == (1, search.LEAST_GAIN)
    assert search.choose(rounds([0.995] * 8, 1.0))[0] == 0  # too little to leave the default
    assert search.choose(rounds([0.9] * 8, 0.85))[0] == 0  # the default again is as far from itself
    assert search.choose(rounds([0.7, 1.0] * 4, 1.0))[0] == 0  # 15 % on average, but the rounds disagree by 30 %
    assert search.choose(rounds([0.88, 0.98] * 4, 1.0)) == (0, pytest.approx(0.1, abs=0.02))
    assert search.choose([[1.0, 0.9, 0.5, 0.8, 1.0]] * 8)[0] == 2


def test_stopped_and_run_again_it_goes_on(toy: Make, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    machine, cases = toy(Toy(50), sizes=(10, 100, 1000))

    def stop(outcome: object, left: int, seconds: float) -> None:
        if left == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search.tune(cases, machine, Table(PROVENANCE), path, rounds=3, report=stop)
    found = table.load(path)
    assert [e.where for e in found.entries] == [{"size": 10}, {"size": 100}]
    outcomes: list[Any] = []
    search.tune(cases, machine, found, path, rounds=3, report=lambda o, *_: outcomes.append(o.case))
    assert outcomes == ["toy 1000"]
    assert [e.where["size"] for e in table.load(path).entries] == [10, 100, 1000]


def test_other_kernels_are_measured_again(toy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, cases = toy(Toy(50))
    first, _ = tuned(machine, cases, tmp_path / "out.json")
    assert search.known(first, cases[0])
    monkeypatch.setattr(search, "source_hash", lambda choice: "changed")
    assert not search.known(first, cases[0])
    second = search.tune(cases, machine, first, tmp_path / "out.json", rounds=3)
    assert [e.source for e in second.entries] == ["changed"]


def test_the_time_is_kept(toy: Make, tmp_path: Path) -> None:
    machine, cases = toy(Toy(50), sizes=(10, 100, 1000, 10000))
    tuned(machine, cases[:1], tmp_path / "one.json", clock=machine.clock)
    one_case, start = machine.clock.now, machine.clock.now
    result, _ = tuned(machine, cases, tmp_path / "out.json", clock=machine.clock, seconds=3.5 * one_case)
    assert len(result.entries) == 3
    assert machine.clock.now - start <= 3.5 * one_case


def test_a_case_that_breaks_the_gpu_is_passed_over_next_time(toy: Make, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    machine, cases = toy(Toy(50, LOST), sizes=(10, 100))
    with pytest.raises(GpuLost, match="toy 10, candidate cost=50 fault=5: RuntimeError: an illegal memory access"):
        tuned(machine, cases, path)
    machine.lost = False
    with pytest.raises(GpuLost, match="toy 100"):
        search.tune(cases, machine, table.load(path), path, rounds=3)
    assert len(table.load(path).failed) == 2
    machine.lost = False
    assert search.tune(cases, machine, table.load(path), path, rounds=3).entries == ()


def test_a_default_that_does_not_run_is_said(toy: Make, tmp_path: Path) -> None:
    machine, (case, other) = toy(Toy(50), sizes=(10, 100))

    def broken(x: Tensor) -> None:
        raise RuntimeError("out of resources")

    def too_large(device: torch.device) -> tuple:
        raise RuntimeError("out of memory")

    broken_cases = [replace(case, launch=broken), replace(case, inputs=too_large)]
    _, outcomes = tuned(machine, [*broken_cases, other], tmp_path / "out.json")
    assert [outcome.reason for outcome in outcomes[:2]] == [
        "the default cost=100 fault=0 does not run: RuntimeError: out of resources",
        "the default cost=100 fault=0 does not run: RuntimeError: out of memory",
    ]
    assert isinstance(outcomes[2], Trial)


def test_a_case_that_cannot_be_measured_is_said(toy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, cases = toy(Toy(50))

    def refuse(launches: object, rounds: int) -> None:
        raise RuntimeError("cannot be captured")

    monkeypatch.setattr(machine, "measure", refuse)
    result, outcomes = tuned(machine, cases, tmp_path / "out.json")
    assert outcomes == [Unmeasured("toy 8", "it cannot be measured: RuntimeError: cannot be captured")]
    assert not result.entries and not search.known(result, cases[0])  # so it is tried again


def test_inputs_go_round_until_they_have_left_the_cache() -> None:
    machine = FakeGpu(Clock())
    machine.cache_bytes = 1000
    assert search.sets_beyond_cache((torch.ones(100), None, 3), machine) == 4  # 400 bytes a set
    assert search.sets_beyond_cache((torch.ones(1000),), machine) == 2


def test_results_may_differ_by_roundings_only() -> None:
    expected = torch.randn(1000).to(BF16)
    near = (expected.float() * (1 + 2**-8)).to(BF16)
    assert search.difference([near], [expected], [near]) is None
    off = expected.clone()
    off[17] += 0.5
    for wrong in (off, expected * float("nan"), expected[:-1]):
        assert "wrong" in str(search.difference([wrong], [expected], [wrong]))
    assert "two runs differ" in str(search.difference([near], [expected], [expected]))


# The cases of the operations, run by Triton's interpreter at a tiny size


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="does not apply: needs Triton's interpreter")
@pytest.mark.parametrize("op", search.OPS)
def test_every_case_runs_and_its_choice_is_used(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interpreter(FakeGpu):
        gpu = Gpu("interpreter", 2, "interpreter")

        def measure(self, launches: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
            assert len(launches) == 3  # the default, the candidate, the default
            return [[1.0, 0.5, 1.0]] * rounds

    monkeypatch.setattr(search, "CONFIRMATIONS", 2)  # the interpreter has no races
    monkeypatch.setitem(search.MODELS, "tiny", Model("tiny", 4, 32, 2, batch=1, image=8))
    if op == "cross_entropy":
        monkeypatch.setattr(importlib.import_module("fastvit_kernels.cross_entropy.tuning"), "BATCH", 2)
    # with the candidates of a GPU; QuACK's are tried in test_gemm_quack.py
    on_hopper = {c.name: c for c in search.cases([op], ["tiny"], HOPPER) if "QuACK" not in c.name}
    cases = [replace(c, candidates=c.options(Interpreter.gpu)[1:][-1:]) for c in on_hopper.values()]
    machine = Interpreter(Clock())
    start = Table(replace(PROVENANCE, gpu="interpreter"))
    outcomes: list[Any] = []
    result = search.tune(
        cases, machine, start, tmp_path / "out.json", rounds=2, report=lambda o, *_: outcomes.append(o)
    )
    assert [(o.case, getattr(o, "discarded", o)) for o in outcomes] == [(case.name, {}) for case in cases]
    with table.using(result):
        for case in cases:
            assert case.tunable(*case.key, machine.gpu) == case.candidates[0]


# The command


class CommandGpu(FakeGpu):
    """In the place of `LocalGpu`."""

    class Compiler:
        def close(self) -> None:
            pass

    compiler = Compiler()


@pytest.fixture
def command(toy: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    machine, cases = toy(Toy(50), Toy(10, WRONG), sizes=(10, 100))
    machine.__class__ = CommandGpu
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tool, "LocalGpu", lambda *_: machine)
    monkeypatch.setattr(
        search, "cases", lambda ops, models, gpu, words: [case for case in cases if not words or case.name in words]
    )

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["tuning", *arguments])
        return tool.main()

    return run


def test_the_command_prints_a_table_and_writes_the_file(command: Callable[..., int], capsys: Any) -> None:
    assert command("--quick") == 0
    printed = capsys.readouterr()
    assert [row.split()[:2] for row in printed.out.splitlines()[2:] if not row.startswith(" ")] == [
        ["toy", "10"],
        ["toy", "100"],
    ]
    assert "cost=50 fault=0\n    left out cost=10 fault=1: wrong: result 0 differs" in printed.out
    assert "1 cases left, about" in printed.err
    assert f"X90.json: all cases are measured. Use it with FASTVIT_TUNING={Path.cwd()}/X90.json" in printed.err
    written = table.load(Path("X90.json"))
    assert written.provenance.measured and written.provenance.quick and len(written.entries) == 2
    assert command("--quick", "--json") == 0  # nothing is left to do
    assert json.loads(capsys.readouterr().out) == []


def test_the_command_measures_cases_by_words_of_their_names(command: Callable[..., int], capsys: Any) -> None:
    assert command("--cases", "toy 100", "--json") == 0
    assert [row["case"] for row in json.loads(capsys.readouterr().out)] == ["toy 100"]
    assert command("--cases", "tyo", "yot") == 2
    assert "no case has a name with tyo or yot; --dry-run lists the names" in capsys.readouterr().err


def test_cases_are_chosen_by_words_of_their_names() -> None:
    found = search.cases(["gemm"], ["H/14"], HOPPER, ["QuACK", "residual"])
    assert {case.tunable.kernel for case in found} == {"quack_gemm", "gemm_kernel", "residual_fwd_kernel"}
    assert all("QuACK" in case.name or "residual" in case.name for case in found)


def test_the_command_goes_on_within_the_time(command: Callable[..., int], capsys: Any) -> None:
    assert command("--minutes", "0") == 0
    assert "2 cases are left: run the same command again" in capsys.readouterr().err
    assert command("--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["chosen"] for row in rows] == ["cost=50 fault=0"] * 2


def test_the_command_mixes_no_measurements(command: Callable[..., int], capsys: Any, tmp_path: Path) -> None:
    assert command("--quick") == 0
    assert command() == 2
    assert "X90.json has quick True, not False: choose another --out, or remove it" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("[]")
    assert command("--out", "other.json") == 2
    assert "other.json is not one that fastvit_kernels.tuning wrote" in capsys.readouterr().err
    assert command("--untuned", "X90", "--out", "other.json") == 0
    assert command("--out", "other.json") == 0  # nothing had been measured, so nothing is mixed


def test_the_command_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["tuning"])
    assert tool.main() == 2
    assert capsys.readouterr().err.splitlines() == [
        "fastvit_kernels.tuning: tuning measures on a GPU, and PyTorch sees none here; --dry-run needs none"
    ]


@pytest.mark.codegen
@pytest.mark.slow
def test_the_dry_run_compiles_the_candidates_without_a_gpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = ["--dry-run", "--arch", "sm_90", "--ops", "cross_entropy", "--shapes", "B/16", "--jobs", "1", "--json"]
    result = subprocess.run(
        [sys.executable, "-m", "fastvit_kernels.tuning", *arguments], env=environment, capture_output=True, check=True
    )
    rows = json.loads(result.stdout)
    losses = {
        "cross_entropy, softmax, 1000 classes",
        "cross_entropy, softmax, 1000 soft labels",
        "cross_entropy, sigmoid, 21843 classes",
    }
    assert {row["case"] for row in rows} == losses | {f"{loss}, who runs it" for loss in losses}
    for row in rows:
        if row["case"] not in losses:  # PyTorch's own kernels need no compilation
            assert row["obstacle"] is None
            continue
        (kernel,) = (value for name, value in row.items() if name.endswith("_kernel"))
        assert row["obstacle"] is None and 0 < kernel["registers"] < 256


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.json"
    arguments = ["--ops", "layer_norm", "--shapes", "S/16", "--quick", "--jobs", "4", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["tuning", *arguments])
    assert tool.main() == 0
    measured = table.load(out)
    assert len(measured.entries) == 3 and not measured.failed
    traffic = 2 * 64 * 197 * 384 * 2  # bytes that layer_norm reads and writes
    for e in measured.entries:
        assert 0 < e.ms <= e.default_ms * 1.5
        assert traffic / (e.default_ms / 1e3) < 50e12  # no GPU is that fast: then nothing would have been timed
