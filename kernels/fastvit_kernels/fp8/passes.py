"""Launches of passes that leave a matrix for a product in FP8, besides those of `layer_norm` and `gemm`."""

import torch
from torch import Tensor

from fastvit_kernels.dispatch import HAS_TRITON
from fastvit_kernels.fp8_scales.handoff import SLOTS, Handoff
from fastvit_kernels.layer_norm.op import whole_rows
from fastvit_kernels.registration import cdiv

if HAS_TRITON:
    from fastvit_kernels.fp8 import kernels
    from fastvit_kernels.launch import launch

MOST = 32  # numbers of a row that a thread holds


def gelu(pre: Tensor, tanh: bool, handoff: Handoff, *, keep: bool) -> Tensor:
    """GELU of pre [T, M], of which `handoff` is filled; empty if that has it in FP8 and it is not to be kept."""
    rows, width = pre.shape
    writes = keep or handoff.rows is None
    post = torch.empty_like(pre) if writes else pre.new_empty(0)
    block_m, block_n, warps = whole_rows(width, MOST)
    launch(
        kernels.gelu_quantise_kernel,
        (cdiv(rows, block_m),),
        pre,
        post if writes else None,
        *handoff.pointers(),
        rows,
        width,
        TANH=tanh,
        SLOTS=SLOTS,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        CHUNKS=cdiv(width, block_n),
        MASKED=width % block_n > 0,
        num_warps=warps,
    )
    return post
