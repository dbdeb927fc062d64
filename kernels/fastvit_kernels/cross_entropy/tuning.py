"""The launch parameters of cross-entropy that `fastvit_kernels.tuning` tries."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastvit_kernels.cross_entropy import op
from fastvit_kernels.cross_entropy.op import Block
from fastvit_kernels.dispatch import Gpu
from fastvit_kernels.table import Runs
from fastvit_kernels.tuning.search import HALF, Case, Model

BATCH = 1024  # of a whole training step: the loss is the same for every model


def cases(model: Model, on: Gpu) -> Iterator[Case]:
    for sigmoid, classes, soft in ((False, 1000, False), (False, 1000, True), (True, 21843, False)):
        kernel = "sigmoid_fwd_kernel" if sigmoid else "softmax_fwd_kernel"
        kind = f"{'sigmoid' if sigmoid else 'softmax'}, {classes} {'soft labels' if soft else 'classes'}"
        yield Case(
            f"cross_entropy, {kind}",
            op.column_block,
            (sigmoid, classes, soft, HALF, BATCH),
            [Block(columns, warps) for columns in (512, 1024, 2048, 4096) for warps in (4, 8) if columns < 4 * classes],
            partial(inputs, sigmoid, classes, soft),
            op.launch_forward,
            (kernel,),
        )
        yield Case(
            f"cross_entropy, {kind}, who runs it",
            op.runs,
            (sigmoid, classes, soft, HALF, BATCH),
            [Runs("reference")],
            partial(inputs, sigmoid, classes, soft),
            step,
            (),
        )


def inputs(sigmoid: bool, classes: int, soft: bool, device: torch.device) -> tuple:
    """A training step: the loss with its gradient."""
    logits = torch.randn(BATCH, classes, dtype=HALF, device=device)
    if soft:
        labels = torch.rand(BATCH, classes, device=device).div_(classes / 2)
    else:
        labels = torch.randint(classes, (BATCH,), device=device)
    return logits, labels, None, None, 0.1, 0.0, sigmoid, True


def step(logits: Tensor, labels: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """Forward and backward pass of the same loss."""
    *_, smoothing, _, sigmoid, _ = others
    loss = op.sigmoid_cross_entropy if sigmoid else op.cross_entropy
    logits = logits.detach().requires_grad_()
    mean = loss(logits, labels, label_smoothing=smoothing)
    return mean.detach(), *torch.autograd.grad(mean, logits)
