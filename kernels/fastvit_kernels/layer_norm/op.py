"""Public layer normalisation functions, their checks, launches and gradients."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit_kernels.checks import check_device, check_floating, check_parameter, check_rate
from fastvit_kernels.column_sums import ColumnSums
from fastvit_kernels.dispatch import HAS_TRITON, Gpu, gpu, unmeasured, uses_triton
from fastvit_kernels.fp8_scales.handoff import NOTHING, SLOTS, Handoff
from fastvit_kernels.layer_norm import reference
from fastvit_kernels.registration import cdiv, register_gradient, register_op
from fastvit_kernels.residual import draw_path_scale, rows_of_sample
from fastvit_kernels.table import Runs, tunable

if HAS_TRITON:
    import triton

    from fastvit_kernels.launch import launch
    from fastvit_kernels.layer_norm import kernels


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Layer normalisation over the last dimension (Ba et al. 2016), statistics in float32.

    Args:
        x: [..., D], any floating dtype.
        weight, bias: [D], the dtype of x or float32.
        eps: added to the variance; 1e-6 in Vision Transformers.

    Returns [..., D] in the dtype of x, under autocast too. Raises ValueError for a wrong shape or device, TypeError for
    a wrong dtype.
    """
    check_floating("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have a last dimension to normalise, got shape {list(x.shape)}")
    check_parameter("weight", weight, x.shape[-1:], like=x, fp32_allowed=True)
    check_parameter("bias", bias, x.shape[-1:], like=x, fp32_allowed=True)
    if uses_triton("layer_norm", x, measured=lambda: runs_for(x, branch=False)):
        return layer_norm_op(x, None, None, None, weight, bias, eps)[1]
    return reference.layer_norm(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    layer_scale: Tensor | None = None,
    drop_path: float = 0.0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The end of one residual half-block and the start of the next: y = x + drop_path(layer_scale * branch), norm(y).

    Args:
        x: [B, ..., D], any floating dtype: the residual stream.
        branch: the shape of x; the dtype of x, or any floating dtype if x is float32.
        weight, bias: [D] of the normalisation, the dtype of x or float32.
        layer_scale: [D], the dtype of x or float32; None leaves it out.
        drop_path: rate at which a sample's whole branch is dropped; kept branches are scaled by 1 / (1 - drop_path).
            Active whenever above 0.
        eps: added to the variance.

    Returns (y, norm(y)), each the shape and dtype of x, under autocast too. Raises ValueError for a wrong shape, device
    or rate and TypeError for a wrong dtype.
    """
    check_floating("x", x)
    if x.ndim < 2 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape [B, ..., D], got {list(x.shape)}")
    check_floating("branch", branch)
    if branch.shape != x.shape:
        raise ValueError(f"branch must have the shape of x, {list(x.shape)}, got {list(branch.shape)}")
    if branch.dtype != x.dtype and x.dtype != torch.float32:
        raise TypeError(f"branch must be {x.dtype} like x, got {branch.dtype}")
    check_device("branch", branch, like=x)
    check_parameter("weight", weight, x.shape[-1:], like=x, fp32_allowed=True)
    check_parameter("bias", bias, x.shape[-1:], like=x, fp32_allowed=True)
    if layer_scale is not None:
        check_parameter("layer_scale", layer_scale, x.shape[-1:], like=x, fp32_allowed=True)
    check_rate("drop_path", drop_path)
    path_scale = draw_path_scale(branch, drop_path)
    if uses_triton("layer_norm", x, measured=lambda: runs_for(x, branch=True)):
        return layer_norm_op(x, branch, layer_scale, path_scale, weight, bias, eps)[:2]
    return reference.add_layer_norm(x, branch, weight, bias, layer_scale, path_scale, eps)


def runs_for(x: Tensor, branch: bool) -> Runs:
    return runs(x.shape[-1], x.dtype, branch, x.numel() // x.shape[-1], gpu(x.device))


@tunable(Runs, "layer_norm", sizes=("rows",), providers=("triton", "reference"))
def runs(width: int, dtype: torch.dtype, branch: bool, rows: int, on: Gpu) -> Runs:
    return unmeasured("layer_norm", dtype)


# One operator does both: without a branch nothing is added, and the sum y, which would be x itself, is empty. Operators
# cannot return None or an alias, so every output that does not exist or would repeat another is an empty tensor.


def launch_forward(
    x: Tensor,
    branch: Tensor | None,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, normed, mean, rstd = normalise(
        as_rows(x),
        weight,
        bias,
        eps,
        x.dtype,
        branch=None if branch is None else as_rows(branch),
        layer_scale=layer_scale,
        path_scale=path_scale,
    )
    y = x.new_empty(0) if branch is None else y.view_as(x)
    return y, normed.view_as(x), mean.view(x.shape[:-1]), rstd.view(x.shape[:-1])


def normalise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    branch: Tensor | None = None,
    branch_bias: Tensor | None = None,
    layer_scale: Tensor | None = None,
    path_scale: Tensor | None = None,
    handoff: Handoff | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = x + path_scale * layer_scale * (branch + branch_bias), norm(y) in `dtype`, and the statistics of its rows.

    x and branch are [T, D] with adjacent columns, see `as_rows`. Without a branch, y is x itself. `handoff`: what the
    pass leaves of norm(y) for a product in FP8.
    Statistics, mean and 1 / deviation, are [T] float32.
    """
    rows, width = x.shape
    y, normed = x if branch is None else x.new_empty(rows, width), x.new_empty(rows, width, dtype=dtype)
    mean, rstd = x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)
    tile = forward_tile(width, x.dtype, branch is not None, rows, gpu(x.device))
    launch(
        kernels.layer_norm_fwd_kernel,
        (cdiv(rows, tile.rows),),
        x,
        branch,
        None if branch_bias is None else branch_bias.contiguous(),
        None if layer_scale is None else layer_scale.contiguous(),
        path_scale,
        weight.contiguous(),
        bias.contiguous(),
        None if branch is None else y,
        normed,
        mean,
        rstd,
        *(NOTHING if handoff is None else handoff).pointers(),
        rows,
        width,
        rows_of_sample(rows, path_scale),
        x.stride(0),
        0 if branch is None else branch.stride(0),
        eps,
        SLOTS=SLOTS,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        CHUNKS=cdiv(width, tile.columns),
        MASKED=width % tile.columns > 0,
        num_warps=tile.num_warps,
    )
    return y, normed, mean, rstd


def fake_forward(
    x: Tensor,
    branch: Tensor | None,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = x.new_empty(0 if branch is None else x.shape)
    normed = x.new_empty(x.shape)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return y, normed, mean, rstd


def launch_backward(
    grad_y: Tensor | None,
    grad_normed: Tensor,
    y: Tensor,
    branch: Tensor | None,
    branch_dtype: torch.dtype,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = fake_backward(
        grad_y, grad_normed, y, branch, branch_dtype, layer_scale, path_scale, weight, bias, mean, rstd
    )
    grad_x, grad_branch, grad_layer_scale, grad_weight, grad_bias = gradients
    partial = launch_gradient(
        None if grad_y is None else as_rows(grad_y),
        as_rows(grad_normed),
        as_rows(y),
        weight,
        mean,
        rstd,
        grad_x,
        branch=None if branch is None or layer_scale is None else as_rows(branch),
        layer_scale=layer_scale,
        path_scale=path_scale,
        grad_branch=grad_branch if grad_branch.shape == y.shape else None,
    )
    sums = ColumnSums()
    sums.add(partial, grad_weight, grad_bias, *(() if layer_scale is None else (grad_layer_scale,)))
    sums.launch()
    return gradients


def launch_gradient(
    grad_y: Tensor | None,
    grad_normed: Tensor,
    y: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_x: Tensor,
    *,
    branch: Tensor | None = None,
    layer_scale: Tensor | None = None,
    path_scale: Tensor | None = None,
    unscaled: Tensor | None = None,
    grad_branch: Tensor | None = None,
    learns: bool = True,
    sum_grad_y: bool = False,
    sum_branch: bool = False,
) -> Tensor:
    """Writes the gradient of x, where y = x + path_scale * layer_scale * branch, to `grad_x`, and what is asked for.

    Inputs are [T, D] with adjacent columns, see `as_rows`. With G = path_scale * grad_x, G goes to `unscaled` and
    layer_scale * G to `grad_branch`. Returns partial column sums for `ColumnSums`, [sums, programs, D], in this order:
    gradients of weight and bias if it `learns`, of layer_scale if there is a `branch`, and sums of grad_y and of G, if
    asked for.
    """
    rows, width = y.shape
    wanted = 2 * learns + (branch is not None) + sum_grad_y + sum_branch
    tile = backward_tile(width, y.dtype, wanted, rows, gpu(y.device))
    programs = min(tile.programs * gpu(y.device).multiprocessors, cdiv(rows, tile.rows))
    partial = y.new_empty(wanted, programs, width, dtype=torch.float32)
    launch(
        kernels.layer_norm_bwd_kernel,
        (programs,),
        grad_y,
        grad_normed,
        y,
        branch,
        None if layer_scale is None else layer_scale.contiguous(),
        path_scale,
        weight.contiguous(),
        mean,
        rstd,
        grad_x,
        unscaled,
        grad_branch,
        partial,
        rows,
        width,
        rows_of_sample(rows, path_scale),
        0 if grad_y is None else grad_y.stride(0),
        grad_normed.stride(0),
        y.stride(0),
        0 if branch is None else branch.stride(0),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        CHUNKS=cdiv(width, tile.columns),
        MASKED=width % tile.columns > 0,
        SUM_PARAMETERS=learns,
        SUM_GRAD_Y=sum_grad_y,
        SUM_BRANCH=sum_branch,
        STAGES=tile.stages,
        num_warps=tile.num_warps,
    )
    return partial


def fake_backward(
    grad_y: Tensor | None,
    grad_normed: Tensor,
    y: Tensor,
    branch: Tensor | None,
    branch_dtype: torch.dtype,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_x = y.new_empty(y.shape)
    repeats_grad_x = layer_scale is None and path_scale is None and branch_dtype == y.dtype
    grad_branch = y.new_empty(0 if repeats_grad_x else y.shape, dtype=branch_dtype)
    grad_layer_scale = y.new_empty(0) if layer_scale is None else layer_scale.new_empty(layer_scale.shape)
    return grad_x, grad_branch, grad_layer_scale, weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def as_rows(tensor: Tensor) -> Tensor:
    """[..., D] as [rows, D] with adjacent columns: a view if strides allow it, else a copy."""
    if tensor.ndim == 2 and tensor.is_contiguous():  # as nearly all are, and the quickest to see
        return tensor
    rows = tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


class ForwardTile(NamedTuple):
    """Launch parameters of the forward kernel."""

    rows: int  # whole ones, of a program
    columns: int  # of a chunk of them
    num_warps: int


class BackwardTile(NamedTuple):
    """Launch parameters of the backward kernel."""

    rows: int  # whole ones, that a program holds at once
    columns: int  # of a chunk of them
    num_warps: int
    stages: int  # 2: rows of the next tile are fetched while this one is computed
    programs: int  # a multiprocessor


@tunable(ForwardTile, "layer_norm_fwd_kernel", sizes=("rows",))
def forward_tile(width: int, dtype: torch.dtype, branch: bool, rows: int, on: Gpu) -> ForwardTile:
    return ForwardTile(*whole_rows(width, most=64))


@tunable(BackwardTile, "layer_norm_bwd_kernel", sizes=("rows",))
def backward_tile(width: int, dtype: torch.dtype, sums: int, rows: int, on: Gpu) -> BackwardTile:
    """A thread holds each number of a row, its gradient and up to five sums: as many as 255 registers allow."""
    tile = whole_rows(width, most=52 if sums <= 2 else 26)
    return BackwardTile(*tile, stages=2 if width <= 4096 else 1, programs=2)


def whole_rows(width: int, most: int) -> tuple[int, int, int]:
    """Rows, columns of a chunk and warps for a tile of whole rows, where a thread has `most` numbers of a row.

    One warp per row if that is enough, since sums over a row then stay within it, and four warps per program. Chunks of
    256 columns are 16 bytes per thread in half precision.
    """
    warps_a_row = min(16, triton.next_power_of_2(triton.cdiv(width, 32 * most)))
    columns = next((size for size in (256, 128, 64) if width % size == 0), min(256, triton.next_power_of_2(width)))
    columns = max(columns, triton.next_power_of_2(triton.cdiv(width, 16)))  # at most 16 chunks, which are unrolled
    return max(1, 4 // warps_a_row), columns, max(4, warps_a_row)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, branch, layer_scale, path_scale, weight, bias, _ = inputs
    y, _, mean, rstd = output
    ctx.has_branch = branch is not None
    ctx.branch_dtype = x.dtype if branch is None else branch.dtype
    ctx.save_for_backward(
        x if branch is None else y,
        None if layer_scale is None else branch,  # only the gradient of layer_scale needs it
        layer_scale,
        path_scale,
        weight,
        bias,  # for its dtype
        mean,
        rstd,
    )
    ctx.mark_non_differentiable(*((y, mean, rstd) if branch is None else (mean, rstd)))
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad_y: Tensor | None, grad_normed: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    y, branch, layer_scale, path_scale, weight, bias, mean, rstd = ctx.saved_tensors
    if grad_normed is None:  # only y was used
        grad_normed = torch.zeros_like(y)
    grad_x, grad_branch, grad_layer_scale, grad_weight, grad_bias = layer_norm_backward_op(
        grad_y, grad_normed, y, branch, ctx.branch_dtype, layer_scale, path_scale, weight, bias, mean, rstd
    )
    if grad_branch.shape != y.shape:
        grad_branch = grad_x
    return (
        grad_x,
        grad_branch if ctx.has_branch else None,
        None if layer_scale is None else grad_layer_scale,
        None,
        grad_weight,
        grad_bias,
        None,
    )


layer_norm_op = register_op(
    "layer_norm(Tensor x, Tensor? branch, Tensor? layer_scale, Tensor? path_scale, Tensor weight, Tensor bias,"
    " float eps) -> (Tensor y, Tensor normed, Tensor mean, Tensor rstd)",
    launch_forward,
    fake_forward,
)
layer_norm_backward_op = register_op(
    "layer_norm_backward(Tensor? grad_y, Tensor grad_normed, Tensor y, Tensor? branch, ScalarType branch_dtype,"
    " Tensor? layer_scale, Tensor? path_scale, Tensor weight, Tensor bias, Tensor mean, Tensor rstd)"
    " -> (Tensor grad_x, Tensor grad_branch, Tensor grad_layer_scale, Tensor grad_weight, Tensor grad_bias)",
    launch_backward,
    fake_backward,
)
register_gradient(layer_norm_op, layer_norm_backward_op, setup_context, backward)
