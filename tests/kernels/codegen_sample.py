"""Compiles the sample of `test_codegen`, and prints what the compiler made of it as JSON.

It runs apart, as nothing compiles under the interpreter, and in one process, in which cases share kernels.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from fastvit_kernels.tuning import codegen
from tests.kernels import codegen_probe

H_14, B_16 = "H/14: 257 tokens, 16 x 80", "B/16: 197 tokens, 12 x 64"
# Every kernel for sm_90, and one or more of each operation for the others: (operation, case, kernels or None for all).
# Blocks have no kernels of their own.
ON_HOPPER: list[tuple[str, str, tuple[str, ...] | None]] = [
    ("attention", H_14, None),
    ("attention", B_16, None),
    ("attention", "H/14, bias", ("attention_bwd_bias_kernel",)),
    ("layer_norm", "768, bfloat16", None),
    ("gemm", "H/14, fc1 with GELU alone", None),
    ("gemm", "H/14, cuBLAS, GELU", None),
    ("gemm", "H/14, cuBLAS, residual", None),
    ("gemm", "H/14, cuBLAS, GELU'", None),
    ("gemm", "H/14, branch and LayerScale gradients", ("layer_scale_bwd_kernel",)),
    ("patch_embed", "H/14, uint8 HWC", None),
    ("patch_embed", "H/14, float32 CHW", ("patch_embed_fwd_kernel",)),
    ("patch_embed", "H/14, uint8 HWC, registers, 64 of 256", ("position_sum_kernel",)),
    ("cross_entropy", "softmax, 1000, index, bfloat16", None),
    ("cross_entropy", "sigmoid, 1000, index, bfloat16", ("sigmoid_fwd_kernel",)),
    ("rotary", "q and k apart, RMS", None),
    ("swiglu", "DINOv2-g/14", None),
    ("fp8", "ViT-H/14, fc1, a scale per row, in Triton", None),
    ("fp8", "ViT-H/14, passes, a scale per row", None),
]
ELSEWHERE: list[tuple[str, str, tuple[str, ...] | None]] = [
    # 80 a head: products of two pieces, which must not chain on sm_100
    ("attention", "H/14, bias", ("attention_bwd_bias_kernel",)),
    ("layer_norm", "192, bfloat16", ("layer_norm_fwd_kernel",)),
    ("gemm", "H/14, cuBLAS, GELU", None),
    ("patch_embed", "H/14, uint8 HWC, registers, 64 of 256", ("position_sum_kernel",)),
    ("cross_entropy", "softmax, 1000, index, bfloat16", ("softmax_fwd_kernel",)),
    ("rotary", "q and k apart, RMS", ("rotary_fwd_kernel",)),
    ("swiglu", "DINOv2-g/14", ("swiglu_fwd_kernel",)),
    ("fp8", "ViT-H/14, LayerNorm, a scale per tensor", ("layer_norm_fwd_kernel",)),
]
SAMPLE = {target: ON_HOPPER if target == "sm_90" else ELSEWHERE for target in codegen.TARGETS}
# for the second assembler, of those for sm_90
SECOND = {"attention": (H_14, B_16), "gemm": ("H/14, fc1 with GELU alone",), "patch_embed": ("H/14, float32 CHW",)}


def compile_sample() -> dict[str, Any]:
    """Rows as in the tables: of the sample, and of a part as the second assembler has it; and what the probe reads."""
    rows, second = [], []
    for target, parts in SAMPLE.items():
        for op, name, wanted in parts:
            case = named(op, name)
            for kernel in codegen.launched(case, codegen.TARGETS[target], wanted):
                row = codegen.result(op, case, codegen.TARGETS[target], kernel)
                rows.append(asdict(row))
                if target == "sm_90" and name in SECOND.get(op, ()) and second_ptxas():
                    second.append(asdict(row) | assembled_again(kernel))
    return {"first": rows, "second": second, "probe": codegen_probe.read_all()}


def every_attention_kernel() -> dict[str, list[dict[str, Any]]]:
    """For sm_90, as the second assembler has it."""
    target, rows = codegen.TARGETS["sm_90"], []
    for case in codegen.cases("attention"):
        for kernel in codegen.launched(case, target):
            rows.append(asdict(codegen.result("attention", case, target, kernel)) | assembled_again(kernel))
    return {"second": rows}


def named(op: str, name: str) -> codegen.Case:
    return next(case for case in codegen.cases(op) if case.name == name)


def assembled_again(kernel: Any) -> dict[str, int]:
    with second_assembler():
        return codegen.read_assembled(kernel, "sm_90")


@contextmanager
def second_assembler() -> Iterator[None]:
    """Inside, ptxas is that of the package nvidia-cuda-nvcc."""
    os.environ["TRITON_PTXAS_PATH"] = str(second_ptxas())
    try:
        yield
    finally:
        del os.environ["TRITON_PTXAS_PATH"]


@lru_cache
def second_ptxas() -> Path | None:
    """None where the package is not installed."""
    try:
        files = metadata.files("nvidia-cuda-nvcc") or []
    except metadata.PackageNotFoundError:
        return None
    return next(Path(str(file.locate())) for file in files if file.name == "ptxas")


if __name__ == "__main__":
    print(json.dumps(every_attention_kernel() if "--attention" in sys.argv else compile_sample()))
