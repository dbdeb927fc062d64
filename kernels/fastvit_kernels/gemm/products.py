"""The matrix products of a linear layer and its gradients, each with what can be fused into it.

Matrices are [rows, columns] with adjacent columns and one dtype, weights [out, in] as in `torch.nn.Linear`. These
functions run inside registered operators: they allocate, launch and know no gradients. `config` decides for each
product between the Triton kernel and cuBLAS with an elementwise kernel, and `quack` whether QuACK takes it instead;
results differ by rounding only.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastvit_kernels.dispatch import HAS_TRITON, gpu
from fastvit_kernels.fp8_scales.handoff import SLOTS, Maxima
from fastvit_kernels.gemm import quack
from fastvit_kernels.gemm.config import (
    Product,
    describable,
    gelu_block,
    gradient_block,
    residual_block,
    runs_triton,
    tile,
)
from fastvit_kernels.registration import cdiv
from fastvit_kernels.residual import rows_of_sample

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from fastvit_kernels.gemm import kernels
    from fastvit_kernels.launch import launch


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x w^T + bias, for x [T, K], weight [N, K] and bias [N]: [T, N]."""
    if not runs_triton("plain", x.dtype, x.device, x.shape[0], *weight.shape):
        return torch.addmm(bias, x, weight.T)
    out = x.new_empty(x.shape[0], weight.shape[0])
    gemm("plain", x, weight, out, b_transposed=True, bias=bias)
    return out


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, tanh: bool, keep_pre: bool = True) -> tuple[Tensor, Tensor]:
    """x w^T + bias, empty unless `keep_pre`, and its GELU, for x [T, K], weight [N, K] and bias [N]: both [T, N]."""
    if (how := quack.chosen("gelu", x.shape[0], *weight.shape, x, weight)) is not None:
        return quack.linear_gelu(x, weight, bias, tanh, keep_pre, how)
    if not runs_triton("gelu", x.dtype, x.device, x.shape[0], *weight.shape):
        pre = torch.addmm(bias, x, weight.T)  # cuBLAS adds the bias in its epilogue
        if keep_pre:
            return pre, gelu(pre, tanh)
        return pre.new_empty(0), gelu(pre, tanh, out=pre)
    pre, post = x.new_empty((x.shape[0], weight.shape[0]) if keep_pre else 0), x.new_empty(x.shape[0], weight.shape[0])
    gemm("gelu", x, weight, pre if keep_pre else None, b_transposed=True, bias=bias, post=post, tanh=tanh)
    return pre, post


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
) -> Tensor:
    """residual + path_scale * layer_scale * (x w^T + bias), [T, N] in the dtype of `residual`, which may be wider.

    layer_scale is [N], path_scale [B] float32: of samples of T / B rows each.
    """
    if runs_triton("residual", x.dtype, x.device, x.shape[0], *weight.shape):
        out = residual.new_empty(*residual.shape)
        gemm(
            "residual",
            x,
            weight,
            out,
            b_transposed=True,
            bias=bias,
            residual=residual,
            layer_scale=layer_scale,
            path_scale=path_scale,
        )
        return out
    return add_residual(torch.mm(x, weight.T), bias, residual, layer_scale, path_scale)


def add_residual(
    branch: Tensor, bias: Tensor, residual: Tensor, layer_scale: Tensor | None, path_scale: Tensor | None
) -> Tensor:
    """residual + path_scale * layer_scale * (branch + bias), as `linear_residual` has it, for branch [T, N]."""
    out = residual.new_empty(*residual.shape)
    (rows, width), block = out.shape, residual_block(branch.dtype, *out.shape, gpu(branch.device))
    launch(
        kernels.residual_fwd_kernel,
        (cdiv(rows, block.rows), cdiv(width, block.columns)),
        residual,
        branch,
        bias,
        layer_scale,
        path_scale,
        out,
        rows,
        width,
        rows_of_sample(rows, path_scale),
        residual.stride(0),
        BLOCK_M=block.rows,
        BLOCK_N=block.columns,
        num_warps=block.num_warps,
    )
    return out


def gelu(pre: Tensor, tanh: bool, out: Tensor | None = None) -> Tensor:
    """GELU of a contiguous tensor, in `out` if given, which may be `pre`."""
    post = torch.empty_like(pre) if out is None else out
    block = gelu_block(pre.dtype, pre.numel(), gpu(pre.device))
    launch(
        kernels.gelu_fwd_kernel,
        (cdiv(pre.numel(), block.columns),),
        pre,
        post,
        pre.numel(),
        TANH=tanh,
        BLOCK=block.columns,
        num_warps=block.num_warps,
    )
    return post


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """grad w, for grad [T, N] and weight [N, K]: [T, K]."""
    if not runs_triton("input gradient", grad.dtype, grad.device, grad.shape[0], *weight.shape[::-1]):
        return torch.mm(grad, weight)
    out = grad.new_empty(grad.shape[0], weight.shape[1])
    gemm("input gradient", grad, weight, out)
    return out


def gelu_gradient(
    grad: Tensor, weight: Tensor, pre: Tensor, tanh: bool, recompute: bool, column_sum: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of GELU's input: grad w * GELU'(pre), for grad [T, N], weight [N, K] and pre [T, K].

    Returns it, partial column sums of it [programs, K], empty unless `column_sum`, and GELU(pre), empty unless
    `recompute`.
    """
    if (how := quack.chosen("gelu gradient", grad.shape[0], *weight.shape[::-1], grad, weight, pre)) is not None:
        grad_pre, partial, post = quack.gelu_gradient(grad, weight, pre, tanh, recompute, column_sum, how)
        if column_sum and not how.column_sums:
            partial = scale_gradient(grad_pre, None)
        return grad_pre, partial, post
    post = pre.new_empty(*pre.shape) if recompute else pre.new_empty(0)
    if not runs_triton("gelu gradient", grad.dtype, grad.device, grad.shape[0], *weight.shape[::-1]):
        grad_pre = torch.mm(grad, weight)
        partial = scale_gradient(
            grad_pre, grad_pre, pre=pre, post=post if recompute else None, tanh=tanh, column_sum=column_sum
        )
    else:
        grad_pre = torch.empty_like(pre)
        t = tile("gelu gradient", grad.dtype, grad.shape[0], *weight.shape[::-1], gpu(grad.device))
        tiles_m = cdiv(pre.shape[0], t.block_m)
        partial = pre.new_empty((tiles_m, pre.shape[1]) if column_sum else 0, dtype=torch.float32)
        gemm(
            "gelu gradient",
            grad,
            weight,
            grad_pre,
            pre=pre,
            post=post if recompute else None,
            partial=partial if column_sum else None,
            tanh=tanh,
        )
    return grad_pre, partial, post


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T x, for grad [T, N] and x [T, K]: [N, K]."""
    if not runs_triton("weight gradient", grad.dtype, grad.device, grad.shape[1], x.shape[1], x.shape[0]):
        return torch.mm(grad.T, x)
    out = grad.new_empty(grad.shape[1], x.shape[1])
    gemm("weight gradient", grad, x, out, a_transposed=True)
    return out


class BranchGradient(NamedTuple):
    """The gradient of a half-block's branch, as `branch_gradient` or the LayerNorm of the next half-block left it.

    With G = path_scale * grad: what would equal another is that other, and what nothing needs may be empty.
    """

    unscaled: Tensor  # [T, D]: G
    scaled: Tensor  # [T, D]: layer_scale * G
    partial: Tensor  # [programs, D] float32: partial column sums of G; [0] if not asked for

    @property
    def has_sums(self) -> bool:
        """Not a matter of size: without tokens there are sums, of no programs."""
        return self.partial.ndim == 2


def branch_gradient(
    grad: Tensor,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
    dtype: torch.dtype,
    *,
    unscaled: bool = True,
    scaled: bool = True,
    column_sum: bool = True,
) -> BranchGradient:
    """The gradient of a branch in `dtype`, given that of the half-block's output; the last arguments say what of it."""
    changes = path_scale is not None or grad.dtype != dtype
    unscaled = unscaled or (scaled and layer_scale is None)
    out = grad.new_empty(grad.shape if unscaled else 0, dtype=dtype) if changes else grad
    scaled_out = out if layer_scale is None else grad.new_empty(grad.shape if scaled else 0, dtype=dtype)
    partial = scale_gradient(
        grad,
        out if changes and unscaled else None,
        scaled=scaled_out if scaled and layer_scale is not None else None,
        layer_scale=layer_scale,
        path_scale=path_scale,
        column_sum=column_sum,
    )
    return BranchGradient(out, scaled_out, partial)


def scale_gradient(
    grad: Tensor,
    out: Tensor | None,
    *,
    pre: Tensor | None = None,
    post: Tensor | None = None,
    scaled: Tensor | None = None,
    layer_scale: Tensor | None = None,
    path_scale: Tensor | None = None,
    tanh: bool = False,
    column_sum: bool = True,
    maxima: Maxima | None = None,
) -> Tensor:
    """Writes path_scale * grad * GELU'(pre) to `out`, layer_scale times that to `scaled`, GELU(pre) to `post`.

    maxima: those of `out`, for its product in FP8. Returns partial column sums of `out`, or an empty tensor unless
    `column_sum`; does nothing if nothing is asked for.
    """
    if out is None and scaled is None and not column_sum:
        return grad.new_empty(0, dtype=torch.float32)
    (rows, width), on = grad.shape, gpu(grad.device)
    block = gradient_block(grad.dtype, pre is not None, rows, width, on)
    blocks_n = cdiv(width, block.columns)
    programs = min(cdiv(rows, block.rows), cdiv(8 * on.multiprocessors, blocks_n))
    partial = grad.new_empty(*((programs, width) if column_sum else (0,)), dtype=torch.float32)
    launch(
        kernels.gradient_kernel,
        (blocks_n, programs),
        grad,
        pre,
        layer_scale,
        path_scale,
        out,
        scaled,
        post,
        partial if column_sum else None,
        *(maxima or Maxima()),
        rows,
        width,
        rows_of_sample(rows, path_scale),
        grad.stride(0),
        TANH=tanh,
        SLOTS=SLOTS,
        BLOCK_M=block.rows,
        BLOCK_N=block.columns,
        num_warps=block.num_warps,
    )
    return partial


def layer_scale_gradients(
    product: Tensor, weight: Tensor, bias: Tensor, layer_scale: Tensor, column_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, bias and layer_scale in y = layer_scale * (x w^T + bias), without y or the branch.

    With G the gradient of y, `product` [N, K] is G^T x and `column_sum` [N] float32 that of G. Then
    grad layer_scale = rowsum(product * w) + bias * column_sum, and the others are layer_scale times what is given.
    `product` is overwritten.
    """
    grad_layer_scale, grad_bias = torch.empty_like(layer_scale), torch.empty_like(bias)
    rows, block_m = weight.shape[0], 2
    launch(
        kernels.layer_scale_bwd_kernel,
        (cdiv(rows, block_m),),
        product,
        weight,
        bias,
        layer_scale,
        column_sum,
        grad_layer_scale,
        grad_bias,
        rows,
        weight.shape[1],
        weight.stride(0),
        BLOCK_M=block_m,
        BLOCK_K=1024,
        num_warps=4,
    )
    return product, grad_bias, grad_layer_scale


def gemm(
    product: Product,
    a: Tensor,
    b: Tensor,
    out: Tensor | None,
    *,
    a_transposed: bool = False,
    b_transposed: bool = False,
    bias: Tensor | None = None,
    pre: Tensor | None = None,
    post: Tensor | None = None,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    path_scale: Tensor | None = None,
    partial: Tensor | None = None,
    tanh: bool = False,
) -> None:
    """Launches the Triton kernel: `a` is stored [k, m] if `a_transposed`, else [m, k]; `b` [n, k] or [k, n]."""
    (k, m), n = a.shape if a_transposed else a.shape[::-1], b.shape[0 if b_transposed else 1]
    t = tile(product, a.dtype, m, n, k, gpu(a.device))
    descriptors = t.descriptors and describable(a) and describable(b)
    tiles = cdiv(m, t.block_m) * cdiv(n, t.block_n)
    block_a = (t.block_k, t.block_m) if a_transposed else (t.block_m, t.block_k)
    block_b = (t.block_n, t.block_k) if b_transposed else (t.block_k, t.block_n)
    launch(
        kernels.gemm_kernel,
        (min(tiles, t.programs * gpu(a.device).multiprocessors),),
        TensorDescriptor.from_tensor(a, list(block_a)) if descriptors else a,
        TensorDescriptor.from_tensor(b, list(block_b)) if descriptors else b,
        out,
        post,
        bias,
        pre,
        residual,
        layer_scale,
        path_scale,
        partial,
        m,
        n,
        k,
        rows_of_sample(m, path_scale),
        a.stride(0),
        b.stride(0),
        0 if residual is None else residual.stride(0),
        A_TRANSPOSED=a_transposed,
        B_TRANSPOSED=b_transposed,
        DESCRIPTORS=descriptors,
        TANH=tanh,
        BLOCK_M=t.block_m,
        BLOCK_N=t.block_n,
        BLOCK_K=t.block_k,
        GROUP_M=t.group_m,
        PARTS=t.parts,
        STAGES=t.stages,
        FLATTEN=t.flatten,
        num_warps=t.warps,
    )
