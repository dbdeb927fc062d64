"""The table of a profile: times add up, and each kernel is of the kind that a person would say."""

import pytest

from fastvit_engine.observe.profile_table import (
    DATA,
    OPTIMIZER,
    Call,
    Profile,
    as_text,
    kernel_lines,
    kind_lines,
    kind_of,
    phase_lines,
)


@pytest.mark.parametrize(
    ("name", "phase", "kind"),
    [
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "backward", "communication"),
        ("c10d::allreduce_", "optimizer step", "communication"),
        ("gloo:all_reduce", "backward", "communication"),
        ("ln_fwd_kernel", "forward", "our kernels"),
        ("fastvit::add_layer_norm", "forward", "our kernels"),
        ("flash_fwd_kernel<Flash_fwd_kernel_traits<64>>", "forward", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "backward", "attention"),
        ("fmha_cutlassB_bf16_aligned_64x64", "backward", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "forward", "attention"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT", "forward", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "forward", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16>", "optimizer step", "matrix products"),
        ("Cijk_Ailk_Bljk_BBS_BH_MT128x128", "forward", "matrix products"),
        ("aten::addmm", "forward", "matrix products"),
        ("aten::bmm", "backward", "matrix products"),
        ("void multi_tensor_apply_kernel<AdamFunctor>", "optimizer step", "optimizer"),
        ("aten::_fused_adamw_", "optimizer step", "optimizer"),
        ("aten::mul_", OPTIMIZER, "optimizer"),
        ("aten::mul_", "backward", "other"),
        ("Memcpy HtoD (Pinned -> Device)", "forward", "copies"),
        ("aten::copy_", "forward", "copies"),
        ("aten::select", DATA, "data"),
        ("aten::gelu", "forward", "other"),
        ("aten::mul", "", "other"),
    ],
)
def test_the_kind_of_a_kernel(name: str, phase: str, kind: str) -> None:
    assert kind_of(name, phase, own={"ln_fwd_kernel"}) == kind


CALLS = [
    Call("aten::mm", "forward", 0.3),
    Call("aten::mm", "backward", 0.3),
    Call("aten::mul", "forward", 0.1),
    Call("aten::mul", OPTIMIZER, 0.3),
]


def test_calls_are_added_up_by_kernel_and_by_kind_the_longest_first() -> None:
    kernels = kernel_lines(CALLS)
    assert [(line["name"], line["kind"], line["calls"]) for line in kernels] == [
        ("aten::mm", "matrix products", 2),
        ("aten::mul", "optimizer", 1),
        ("aten::mul", "other", 1),
    ]
    assert [line["share"] for line in kernels] == pytest.approx([0.6, 0.3, 0.1])
    kinds = kind_lines(kernels)
    assert [(line["name"], line["calls"]) for line in kinds] == [("matrix products", 2), ("optimizer", 1), ("other", 1)]
    assert sum(line["share"] for line in kinds) == pytest.approx(1)
    assert kernel_lines([]) == kind_lines([]) == phase_lines([]) == []


def test_the_text_has_every_table_and_at_most_forty_kernels() -> None:
    kernels = kernel_lines([*CALLS, *(Call(f"k{n}", "forward", 1e-6) for n in range(50))])
    profile: Profile = {
        "steps": [100, 101],
        "rank": 0,
        "host": "node-1",
        "device": "cpu",
        "seconds": 1.25,
        "phases": phase_lines([("forward", 0.5), ("forward", 0.5)]),
        "kinds": kind_lines(kernels),
        "kernels": kernels,
    }
    lines = as_text(profile).splitlines()
    assert lines[0] == "steps 100 to 101, rank 0 on node-1, cpu: 1.250 s"
    assert "    1000.000  100.0 %          2  forward" in lines
    assert "     600.000   60.0 %          2  aten::mm  [matrix products]" in lines
    assert lines[-1] == "... and 13 more, in the JSON file"
    assert sum(line.endswith("[other]") for line in lines) == 38
