"""Public cross-entropy functions, their checks, launches and gradients."""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastvit_kernels.checks import check_device, check_floating, check_rate
from fastvit_kernels.cross_entropy import reference
from fastvit_kernels.dispatch import HAS_TRITON, Gpu, gpu, unmeasured, uses_triton
from fastvit_kernels.registration import register_gradient, register_op
from fastvit_kernels.table import Runs, tunable

if HAS_TRITON:
    import triton

    from fastvit_kernels.cross_entropy import kernels
    from fastvit_kernels.launch import launch

Reduction = Literal["mean", "none"]


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    labels_b: Tensor | None = None,
    mix_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Softmax cross-entropy -sum_c t_c log softmax(logits)_c + z_loss * logsumexp(logits)^2, computed in float32.

    The target t is the label, one-hot or soft; with `labels_b` the mixup pair mix_weight * labels +
    (1 - mix_weight) * labels_b (Zhang et al. 2018); then smoothed as (1 - s) * t + s / C for s = `label_smoothing`.

    Args:
        logits: [B, C], any floating dtype, finite.
        labels: class indices int64 [B], or soft labels of any floating dtype [B, C]. Labels get no gradient.
        labels_b, mix_weight: the second labels of the pair, of the same kind as `labels`, and the share of the first
            ones, floating [B]; both or neither.
        label_smoothing: s, at least 0 and below 1.
        z_loss: factor of the penalty that keeps logsumexp(logits) near 0 (Chowdhery et al. 2022, section 5), say 1e-4.
        reduction: "mean" over the batch, or "none".

    Returns a float32 scalar, or [B] for "none" (float64 if the logits are). Raises ValueError for a wrong shape,
    device or rate and TypeError for a wrong dtype. An index outside 0..C-1 is a ValueError on the CPU. On a GPU reading
    the labels back would stall the stream at every step: there the loss of such a row and its gradient are NaN, and the
    reference trips a device-side assertion.
    """
    check_arguments(logits, labels, labels_b, mix_weight, label_smoothing, reduction)
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be at least 0 and finite, got {z_loss}")
    if uses_triton("cross_entropy", logits, measured=lambda: runs_for(logits, labels, sigmoid=False)):
        losses = triton_losses(logits, labels, labels_b, mix_weight, label_smoothing, z_loss, sigmoid=False)
    else:
        losses = reference.cross_entropy(logits, labels, labels_b, mix_weight, label_smoothing, z_loss)
    return reduce(losses, reduction)


def sigmoid_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    labels_b: Tensor | None = None,
    mix_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Binary cross-entropy of every class, -t_c log sigmoid(x_c) - (1 - t_c) log sigmoid(-x_c), summed over classes.

    The loss of Vision Transformers on ImageNet-21k and JFT. Arguments, target, result and errors are those of
    `cross_entropy`; soft labels may be multi-hot and need not sum to 1. The mean is over the batch, not over classes.
    """
    check_arguments(logits, labels, labels_b, mix_weight, label_smoothing, reduction)
    if uses_triton("cross_entropy", logits, measured=lambda: runs_for(logits, labels, sigmoid=True)):
        losses = triton_losses(logits, labels, labels_b, mix_weight, label_smoothing, z_loss=0.0, sigmoid=True)
    else:
        losses = reference.sigmoid_cross_entropy(logits, labels, labels_b, mix_weight, label_smoothing)
    return reduce(losses, reduction)


def runs_for(logits: Tensor, labels: Tensor, sigmoid: bool) -> Runs:
    batch, classes = logits.shape
    return runs(sigmoid, classes, labels.ndim == 2, logits.dtype, batch, gpu(logits.device))


@tunable(Runs, "cross_entropy_loss", sizes=("batch",), providers=("triton", "reference"))
def runs(sigmoid: bool, classes: int, soft: bool, dtype: torch.dtype, batch: int, on: Gpu) -> Runs:
    return unmeasured("cross_entropy", dtype)


def reduce(losses: Tensor, reduction: Reduction) -> Tensor:
    return losses.mean() if reduction == "mean" else losses


def check_arguments(
    logits: Tensor,
    labels: Tensor,
    labels_b: Tensor | None,
    mix_weight: Tensor | None,
    label_smoothing: float,
    reduction: str,
) -> None:
    check_floating("logits", logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must have shape [B, C], got {list(logits.shape)}")
    check_labels("labels", labels, logits)
    if (labels_b is None) != (mix_weight is None):
        raise ValueError("labels_b and mix_weight must be given together")
    if labels_b is not None and mix_weight is not None:
        check_labels("labels_b", labels_b, logits)
        if labels_b.ndim != labels.ndim:
            raise ValueError("labels and labels_b must both be class indices or both be soft labels")
        check_floating("mix_weight", mix_weight)
        if mix_weight.shape != labels.shape[:1]:
            raise ValueError(f"mix_weight must have shape {list(labels.shape[:1])}, got {list(mix_weight.shape)}")
        check_device("mix_weight", mix_weight, like=logits)
    check_rate("label_smoothing", label_smoothing)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")


def check_labels(name: str, labels: Tensor, logits: Tensor) -> None:
    batch, classes = logits.shape
    if labels.dtype == torch.int64:
        expected = [batch]
    elif labels.is_floating_point():
        expected = [batch, classes]
    else:
        raise TypeError(f"{name} must be int64 class indices or floating soft labels, got {labels.dtype}")
    if list(labels.shape) != expected:
        raise ValueError(f"{name} of {labels.dtype} must have shape {expected}, got {list(labels.shape)}")
    check_device(name, labels, like=logits)
    # a compiled graph cannot look at values: there PyTorch checks the indices of the reference
    if labels.dtype == torch.int64 and labels.device.type == "cpu" and batch and not torch.compiler.is_compiling():
        low, high = labels.min().item(), labels.max().item()
        if low < 0 or high >= classes:
            raise ValueError(f"{name} must lie in 0..{classes - 1}, got values from {low} to {high}")


def triton_losses(
    logits: Tensor,
    labels: Tensor,
    labels_b: Tensor | None,
    mix_weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    sigmoid: bool,
) -> Tensor:
    """The loss of each row, float32 [B].

    The gradient is written while the logits are at hand, as that of the mean over the batch, which is what training
    asks for. The backward pass writes again the rows for which another gradient comes in. Float16 takes no part:
    gradients of a mean underflow in it, and loss scaling makes the incoming gradient another one always. Neither does
    torch.compile, whose graphs cannot hand a saved tensor on as a result.
    """
    with_gradient = (
        torch.is_grad_enabled()
        and logits.requires_grad
        and logits.dtype != torch.float16
        and not torch.compiler.is_compiling()
    )
    pair = (None if tensor is None else tensor.detach() for tensor in (labels_b, mix_weight))
    return cross_entropy_op(logits, labels.detach(), *pair, label_smoothing, z_loss, sigmoid, with_gradient)[0]


def launch_forward(
    logits: Tensor,
    labels: Tensor,
    labels_b: Tensor | None,
    mix_weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    sigmoid: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = fake_forward(logits, labels, labels_b, mix_weight, label_smoothing, z_loss, sigmoid, with_gradient)
    losses, statistics, gradient = outputs
    batch, classes = logits.shape
    rows, soft = rows_adjacent(logits), labels.ndim == 2
    block = column_block(sigmoid, classes, soft, logits.dtype, batch, gpu(logits.device))
    labels, labels_b = rows_adjacent(labels), None if labels_b is None else rows_adjacent(labels_b)
    inputs = (rows, labels, labels_b, None if mix_weight is None else mix_weight.contiguous())
    strides = (rows.stride(0), labels.stride(0), 0 if labels_b is None else labels_b.stride(0))
    written = gradient if with_gradient else None
    mean_share = 1 / max(batch, 1)
    options = {"SOFT": soft, "BLOCK_N": block.columns, "num_warps": block.num_warps}
    if sigmoid:
        launch(
            kernels.sigmoid_fwd_kernel,
            (batch,),
            *inputs,
            losses,
            written,
            classes,
            *strides,
            label_smoothing,
            mean_share,
            **options,
        )
    else:
        launch(
            kernels.softmax_fwd_kernel,
            (batch,),
            *inputs,
            losses,
            statistics,
            written,
            batch,
            classes,
            *strides,
            label_smoothing,
            z_loss,
            mean_share,
            **options,
        )
    return outputs


def fake_forward(
    logits: Tensor,
    labels: Tensor,
    labels_b: Tensor | None,
    mix_weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    sigmoid: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    statistics = logits.new_empty(0 if sigmoid else (3, logits.shape[0]), dtype=torch.float32)
    return losses, statistics, logits.new_empty(logits.shape if with_gradient else 0)


def launch_backward(
    grad_losses: Tensor,
    logits: Tensor,
    labels: Tensor,
    labels_b: Tensor | None,
    mix_weight: Tensor | None,
    statistics: Tensor,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    gradient = fake_backward(grad_losses, logits, labels, labels_b, mix_weight, statistics, label_smoothing, z_loss)
    write_gradient(
        gradient, grad_losses, logits, labels, labels_b, mix_weight, statistics, label_smoothing, z_loss, filled=False
    )
    return gradient


def fake_backward(
    grad_losses: Tensor,
    logits: Tensor,
    labels: Tensor,
    labels_b: Tensor | None,
    mix_weight: Tensor | None,
    statistics: Tensor,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    return logits.new_empty(logits.shape)


def launch_correct(
    gradient: Tensor,
    grad_losses: Tensor,
    logits: Tensor,
    labels: Tensor,
    labels_b: Tensor | None,
    mix_weight: Tensor | None,
    statistics: Tensor,
    label_smoothing: float,
    z_loss: float,
) -> None:
    write_gradient(
        gradient, grad_losses, logits, labels, labels_b, mix_weight, statistics, label_smoothing, z_loss, filled=True
    )


def write_gradient(
    gradient: Tensor,
    grad_losses: Tensor,
    logits: Tensor,
    labels: Tensor,
    labels_b: Tensor | None,
    mix_weight: Tensor | None,
    statistics: Tensor,
    label_smoothing: float,
    z_loss: float,
    filled: bool,
) -> None:
    """Writes the gradient [B, C] of the logits; where `filled`, only rows whose incoming gradient is not 1 / B."""
    batch, classes = logits.shape
    rows, soft, sigmoid = rows_adjacent(logits), labels.ndim == 2, not statistics.numel()
    block = column_block(sigmoid, classes, soft, logits.dtype, batch, gpu(logits.device))
    labels, labels_b = rows_adjacent(labels), None if labels_b is None else rows_adjacent(labels_b)
    launch(
        kernels.cross_entropy_bwd_kernel,
        (batch,),
        grad_losses.contiguous(),
        rows,
        labels,
        labels_b,
        None if mix_weight is None else mix_weight.contiguous(),
        None if sigmoid else statistics,
        gradient,
        batch,
        classes,
        rows.stride(0),
        labels.stride(0),
        0 if labels_b is None else labels_b.stride(0),
        label_smoothing,
        z_loss,
        1 / max(batch, 1),
        FILLED=filled,
        SOFT=soft,
        BLOCK_N=block.columns,
        num_warps=block.num_warps,
    )


def rows_adjacent(tensor: Tensor) -> Tensor:
    """The tensor with adjacent numbers in a row: itself if its strides allow it, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class Block(NamedTuple):
    """How a program walks along the classes of a row."""

    columns: int  # per iteration of a program
    num_warps: int


@tunable(Block, "cross_entropy", sizes=("batch",))
def column_block(sigmoid: bool, classes: int, soft: bool, dtype: torch.dtype, batch: int, on: Gpu) -> Block:
    """Up to 8 numbers for each of the 32 threads of a warp."""
    columns = min(2048, triton.next_power_of_2(classes))
    return Block(columns, num_warps=max(1, columns // 256))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, labels_b, mix_weight, ctx.label_smoothing, ctx.z_loss, _, with_gradient = inputs
    _, statistics, gradient = output
    ctx.save_for_backward(logits, labels, labels_b, mix_weight, statistics)
    ctx.gradient = gradient if with_gradient else None
    ctx.mark_non_differentiable(statistics, gradient)
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad_losses: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 7
    if grad_losses is None:
        return None, *nothing
    arguments = (grad_losses, *ctx.saved_tensors, ctx.label_smoothing, ctx.z_loss)
    # the gradient of the forward pass is given away: a second call, after retain_graph, computes its own
    gradient, ctx.gradient = ctx.gradient, None
    if gradient is None or torch.is_grad_enabled():  # a second derivative is refused by the operator
        gradient = cross_entropy_backward_op(*arguments)
    else:
        correct_op(gradient, *arguments)
    return gradient, *nothing


INPUTS = "Tensor logits, Tensor labels, Tensor? labels_b, Tensor? mix_weight"
cross_entropy_op = register_op(
    f"cross_entropy({INPUTS}, float label_smoothing, float z_loss, bool sigmoid, bool with_gradient)"
    " -> (Tensor losses, Tensor statistics, Tensor gradient)",
    launch_forward,
    fake_forward,
)
cross_entropy_backward_op = register_op(
    f"cross_entropy_backward(Tensor grad_losses, {INPUTS}, Tensor statistics, float label_smoothing, float z_loss)"
    " -> Tensor",
    launch_backward,
    fake_backward,
)
correct_op = register_op(
    f"cross_entropy_correct(Tensor(a!) gradient, Tensor grad_losses, {INPUTS}, Tensor statistics,"
    " float label_smoothing, float z_loss) -> ()",
    launch_correct,
    lambda *_: None,
)
register_gradient(cross_entropy_op, cross_entropy_backward_op, setup_context, backward)
