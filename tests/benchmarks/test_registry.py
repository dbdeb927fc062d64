import pytest
import torch

from benchmarks.kernels import Effort, Selection, measure_case, select, works
from benchmarks.machine import measure_ceilings
from benchmarks.ops import all_ops
from benchmarks.registry import Case, all_cases
from benchmarks.shapes import GPU_SHAPES
from benchmarks.terminal import listing
from benchmarks.timing import Clock

CPU = torch.device("cpu")


def test_every_case_has_a_name_of_its_own_and_work_to_do():
    cases = all_cases(all_ops(), GPU_SHAPES, [torch.bfloat16, torch.float32], CPU)
    assert len({case.id for case in cases}) == len(cases)
    assert cases[0].id == "attention/H/14/64/bf16"
    assert {case.shape.name for case in cases} == {shape.name for shape in GPU_SHAPES}
    widths = {case.shape.width for case in cases if case.op.name == "layer_norm"}
    assert widths >= {1280, 1408, 1664}
    assert {case.op.name for case in cases if case.shape.tokens == 256} == {"attention"}
    for case in cases:
        assert set(case.op.passes) == set(works(case))
        assert all(work.bytes > 0 for work in works(case).values())
        names = [provider.name for provider in case.op.providers]
        assert len(set(names)) == len(names)
        assert names[0] == "fastvit" or case.op.name == "adamw"


def test_flops_of_a_block_are_those_of_its_products():
    case = next(case for case in all_cases(all_ops(), GPU_SHAPES, [torch.bfloat16], CPU) if case.op.name == "block")
    rows = 64 * 257
    qkv, proj, mlp, attention = 6 * rows * 1280**2, 2 * rows * 1280**2, 16 * rows * 1280**2, 4 * 64 * 257**2 * 1280
    assert works(case)["forward"].flops == qkv + proj + mlp + attention
    assert works(case)["backward"].flops == 2 * (qkv + proj + mlp) + 2.5 * attention


def test_everybody_who_can_run_on_a_cpu_is_right():
    """The formulations that judge, the inputs, and every provider that needs nothing but a CPU; nothing compiles."""
    cases = [c for c in select(Selection(quick=True, models=("tiny/14@56",)), CPU) if c.device == CPU]
    assert {case.op.name for case in cases} == {op.name for op in all_ops()}
    clock = Clock(CPU)
    ceilings = measure_ceilings(clock, [torch.float32], quick=True)
    seen = set()
    for case in cases:
        row = measure_case(
            case,
            clock,
            ceilings,
            effort=Effort(rounds=2, seconds=1),
            skip=lambda provider: "compiles" if provider.slow else None,
        )
        for provider in row["providers"]:
            assert provider["status"] in ("ok", "skipped"), (case.id, provider)
            if provider["status"] == "ok":
                seen.add(provider["provider"])
                assert all(of_pass["ms"][1] > 0 for of_pass in provider["passes"].values())
        assert set(row["best_peer"]) == set(case.op.passes)
    assert seen >= {"fastvit", "eager", "sdpa", "sdpa math", "timm", "transformers", "torch fused", "torch foreach"}


def test_an_unknown_name_is_refused_with_the_nearest_or_with_all():
    with pytest.raises(ValueError, match=r"no operation 'atention' to measure here; did you mean 'attention'\?"):
        select(Selection(ops=("atention",)), CPU)
    with pytest.raises(ValueError, match="no provider 'xyz' .*; there are .*'eager', 'eager, dense target', "):
        select(Selection(providers=("xyz",)), CPU)


def test_the_listing_shows_providers_as_they_are_typed(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    listed = listing(all_ops(), [], ["patch_embed"]).replace("\n", " ")
    assert " fastvit eager 'eager, unfold' " in listed and " 'compile max-autotune' " in listed


def test_inputs_repeat():
    for op in all_ops():
        case = Case(op, GPU_SHAPES[1], 1, torch.float32, CPU)
        if op.name in ("layer_norm", "cross_entropy", "soft_cross_entropy"):
            first, second, other = case.inputs(0), case.inputs(0), case.inputs(1)
            assert all(torch.equal(first[name], second[name]) for name in first)
            assert not all(torch.equal(first[name], other[name]) for name in first)
