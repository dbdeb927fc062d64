import os
from itertools import cycle, islice

import pytest
import torch

from benchmarks import train
from benchmarks.report import train_markdown
from benchmarks.train import QUICK_CPU_SHAPE, Selection, best_peer, judged
from benchmarks.train_process import CHECKED_STEPS, SLOWEST, classify
from benchmarks.train_variants import REFERENCE, VARIANTS, Setup, resident_batches
from fastvit_engine.distributed.world import World

ORDER = {"precision": "fp32"}
EXPECTED = {"status": "ok", "losses": [7.0, 6.0]}


def losses(variant):
    setup = Setup(QUICK_CPU_SHAPE, 8, "fp32", World(0, 1, torch.device("cpu")))
    step = variant.build(setup)
    batches = [(batch.images, batch.labels) for batch in resident_batches(setup)]
    return [step(*batch).item() for batch in islice(cycle(batches), CHECKED_STEPS)]


def test_all_loops_are_the_same_training():
    """In one process, without DeepSpeed: weights carried over, normalisation, parameter groups, clipping, AdamW."""
    expected = losses(REFERENCE)
    assert expected[-1] != pytest.approx(expected[0], rel=1e-3)
    for variant in VARIANTS:
        if variant.name in ("fastvit", "timm", "timm + fastvit", "transformers"):
            row = judged({"status": "ok", "losses": losses(variant)}, {"status": "ok", "losses": expected}, ORDER)
            assert row["status"] == "ok" and row["loss_distance"] < 1e-5, (variant.name, row)


@pytest.mark.distributed
def test_a_variant_in_its_own_process(tmp_path):
    shape = {"shape": vars(QUICK_CPU_SHAPE), "batch": 8, "precision": "fp32", "steps": 2, "largest_batch": False}
    row = train.run_variant(shape | {"variant": "fastvit ZeRO-1", "peak": {"flops": 1e9, "source": "a guess"}})
    assert row["status"] == "ok", row
    assert len(row["losses"]) == CHECKED_STEPS and row["steps"] == 2
    assert row["images_per_second"] == pytest.approx(8 / (1e-3 * row["ms"][1]))
    flops = 6 * 2 * (17 * 4 * 96**2 + 2 * 17**2 * 96 + 2 * 17 * 96 * 384) + 6 * (16 * 768 * 96 + 96 * 1000)
    flops += 6 * (17 * 2 * 96**2 + 2 * 96**2 + 2 * 17 * 96 + 2 * 96 * 384)  # the last block, for the class token
    assert row["mfu"] == pytest.approx(row["images_per_second"] * flops / 1e9)
    assert row["breakdown_ms"]["matrix products"] > 0 and row["host_ms"] > 0
    assert len(row["slowest"]) == SLOWEST and row["slowest"][0]["ms"] >= row["slowest"][-1]["ms"] >= 0
    assert judged(row, {"status": "ok", "losses": losses(REFERENCE)}, ORDER)["status"] == "ok"


def test_losses_that_leave_the_reference_are_wrong_and_get_no_ratio():
    rows = [
        judged({"status": "ok", "losses": [7.0, 6.001]}, EXPECTED, ORDER),
        judged({"status": "ok", "losses": [7.0, 6.1]}, EXPECTED, ORDER),
        judged({"status": "ok", "losses": [7.0, float("nan")]}, EXPECTED, ORDER),
        judged({"status": "ok", "losses": [7.0, 6.0]}, {"status": "failed", "reason": "no timm"}, ORDER),
    ]
    assert [row["status"] for row in rows] == ["ok", "wrong", "wrong", "unchecked"]
    assert "1.7 %" in rows[1]["reason"]


def test_report_and_best_peer(environment):
    def row(name, ours, status, milliseconds, data="memory"):
        given = {"variant": name, "ours": ours, "data": data, "status": status, "reason": "why"}
        return given | {
            "ms": [milliseconds] * 3, "images_per_second": 1.0, "mfu": 0.5, "memory_bytes": 2**21,
            "loss_distance": 0.0, "peak_flops": 1e12, "peak_source": "s", "breakdown_ms": {"attention": 1.0},
            "host_ms": 3.0, "slowest": [{"name": "attention|x", "ms": 0.5, "calls": 32.0, "kind": "attention"}],
        }  # fmt: skip

    rows = [
        row("fastvit", True, "ok", 10.0),
        row("timm", False, "ok", 15.0),
        row("fast and wrong", False, "wrong", 1.0),
        row("timm", False, "ok", 2.0, "shards"),
        row("timm compile", False, "skipped", 0.0),
    ]
    assert best_peer(rows) == "timm"
    case = {"model": "B/16", "batch": 8, "precision": "fp32", "best_peer": "timm", "variants": rows}
    text = train_markdown({"suite": "train", "quick": True, "environment": environment, "cases": [case]})
    assert "| **fastvit** | memory | 10 (10 to 10) | 1 | 50 % | 2 MiB | 3 | 0 % | 1.50 |" in text
    assert "| fast and wrong | memory | wrong: why |" in text
    assert "Left out: timm compile (why)." in text
    assert "| 0.5 | 50 % | 32 | attention | `attention\\|x` |" in text and text.count("The slowest kernels of") == 2
    assert "A quick run" in text


def test_a_child_that_dies_is_a_row(monkeypatch, tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "train_process.py").write_text("import sys; print('out of luck'); sys.exit(7)")
    monkeypatch.setattr(train, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.chdir(tmp_path)
    assert train.run_variant({}) == {"status": "failed", "reason": "exit code 7: out of luck"}


def test_kernels_are_sorted_by_what_they_are_for():
    named = {
        "nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_NNT": "matrix products",
        "sm90_xmma_gemm_bf16bf16_bf16f32": "matrix products",
        "aten::addmm": "matrix products",
        "attention_bwd_key_kernel": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop": "attention",
        "layer_norm_fwd_kernel": "normalisation",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamW>": "optimizer",
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL": "communication",
        "Memcpy HtoD (Pinned -> Device)": "copies",
        "void at::native::vectorized_elementwise_kernel<4, GeluCUDA>": "elementwise and rest",
    }
    assert {name: classify(name) for name in named} == named


def test_the_most_important_come_first():
    """Where time is limited: ours, bare and through the engine, then the peers to beat."""
    assert [variant.name for variant in VARIANTS[:4]] == ["fastvit", "fastvit ZeRO-1", "timm", "timm compile"]


def test_unknown_variants_are_refused():
    with pytest.raises(ValueError, match=r"there is no variant 'tim' to measure here; did you mean 'timm'\?"):
        train.measure(Selection(quick=True, variants=("tim",)), print)
