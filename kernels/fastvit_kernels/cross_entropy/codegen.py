"""The cases of cross-entropy for `tuning.codegen`: ImageNet-1k and ImageNet-21k, every kind of label."""

from collections.abc import Iterator
from functools import partial

import torch

from fastvit_kernels.cross_entropy.op import launch_backward, launch_correct, launch_forward
from fastvit_kernels.tuning.codegen import Case

HALF, FULL = torch.bfloat16, torch.float32


def cases() -> Iterator[Case]:
    for sigmoid in (False, True):
        kind = "sigmoid" if sigmoid else "softmax"
        for classes in (1000, 21843):
            for labels in ("index", "pair", "soft", "soft pair"):
                yield Case(f"{kind}, {classes}, {labels}, bfloat16", partial(loss, classes, labels, HALF, sigmoid))
        yield Case(f"{kind}, 21843, soft pair, float32", partial(loss, 21843, "soft pair", FULL, sigmoid))


def loss(classes: int, kind: str, dtype: torch.dtype, sigmoid: bool) -> None:
    logits = meta(1024, classes, dtype=dtype)
    labels = meta(1024, classes, dtype=FULL) if kind.startswith("soft") else meta(1024, dtype=torch.int64)
    labels_b, mix_weight = (labels, meta(1024, dtype=FULL)) if kind.endswith("pair") else (None, None)
    for with_gradient in (False, True):
        losses, statistics, gradient = launch_forward(
            logits, labels, labels_b, mix_weight, 0.1, 1e-4, sigmoid, with_gradient
        )
    launch_correct(gradient, losses, logits, labels, labels_b, mix_weight, statistics, 0.1, 1e-4)
    launch_backward(losses, logits, labels, labels_b, mix_weight, statistics, 0.1, 1e-4)


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
