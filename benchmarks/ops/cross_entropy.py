"""Cross-entropy over many classes with the pair of labels of mixup, and over a thousand with one label."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastvit_kernels
from benchmarks.apex_detection import need_apex
from benchmarks.peers import MAX_AUTOTUNE, compiled, need, need_cuda, need_vision
from benchmarks.registry import Binder, Bound, Case, Draw, Inputs, Op, Provider, Work, functional, leaves_of

CLASSES, MANY_CLASSES = 1000, 21_841  # ImageNet-1k and -21k


def inputs(case: Case, draw: Draw) -> dict[str, Tensor]:
    return {"logits": draw.normal(case.batch, CLASSES), "labels": draw.integers(CLASSES, case.batch)}


def soft_inputs(case: Case, draw: Draw) -> dict[str, Tensor]:
    return {
        "logits": draw.normal(case.batch, MANY_CLASSES),
        "labels": draw.integers(MANY_CLASSES, case.batch),
        "labels_b": draw.integers(MANY_CLASSES, case.batch),
        "mix_weight": draw.uniform(case.batch),
    }


def work_of(classes: int) -> Callable[[Case], dict[str, Work]]:
    def work(case: Case) -> dict[str, Work]:
        logits = case.batch * classes * case.dtype.itemsize
        return {"forward": Work(0, logits), "backward": Work(0, 2 * logits)}

    return work


def wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def plain(case: Case) -> Callable[..., Tensor]:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        logits = wide(logits)
        return (logits.logsumexp(-1) - logits.gather(1, labels[:, None])[:, 0]).mean()

    return loss


def plain_soft(case: Case) -> Callable[..., Tensor]:
    def loss(logits: Tensor, labels: Tensor, labels_b: Tensor, mix_weight: Tensor) -> Tensor:
        logits, share = wide(logits), mix_weight.to(wide(logits).dtype)
        first, second = (logits.gather(1, given[:, None])[:, 0] for given in (labels, labels_b))
        return (logits.logsumexp(-1) - share * first - (1 - share) * second).mean()

    return loss


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(wide(logits), labels)


def eager_pair(logits: Tensor, labels: Tensor, labels_b: Tensor, mix_weight: Tensor) -> Tensor:
    logits = wide(logits)
    first, second = (F.cross_entropy(logits, given, reduction="none") for given in (labels, labels_b))
    return (mix_weight * first + (1 - mix_weight) * second).mean()


def dense_targets(labels: Tensor, labels_b: Tensor, mix_weight: Tensor) -> Tensor:
    target = torch.zeros(len(labels), MANY_CLASSES, device=labels.device)
    target.scatter_add_(1, labels[:, None], mix_weight[:, None])
    return target.scatter_add_(1, labels_b[:, None], 1 - mix_weight[:, None])


def eager_dense(logits: Tensor, labels: Tensor, labels_b: Tensor, mix_weight: Tensor) -> Tensor:
    return F.cross_entropy(wide(logits), dense_targets(labels, labels_b, mix_weight))


def timm(case: Case) -> Callable[..., Tensor]:
    loss = need_vision("timm.loss").SoftTargetCrossEntropy()
    return lambda logits, labels, labels_b, mix_weight: loss(wide(logits), dense_targets(labels, labels_b, mix_weight))


def apex(case: Case) -> Callable[..., Tensor]:
    need_cuda(case)
    loss = need_apex("apex.contrib.xentropy.softmax_xentropy").SoftmaxCrossEntropyLoss
    no_padding, to_float = -1, case.dtype != torch.float32  # no label is left out
    return lambda logits, labels: loss.apply(logits, labels, 0.0, no_padding, to_float).mean()


def flash_attn(case: Case) -> Callable[..., Tensor]:
    need_cuda(case)
    loss = need("flash_attn.ops.triton.cross_entropy").cross_entropy_loss
    return lambda logits, labels: loss(logits, labels)[0].mean()


def quack(case: Case) -> Callable[..., Tensor]:
    need_cuda(case)
    loss = need("quack.cross_entropy").cross_entropy
    return lambda logits, labels: loss(logits, labels)


def liger(case: Case) -> Binder:
    """Its forward pass writes the gradient over the logits, which are therefore put back before each call."""
    need_cuda(case)
    loss = need("liger_kernel.transformers.functional").liger_cross_entropy

    def bind(given: Inputs) -> Bound:
        original = given["logits"].detach().clone()
        leaves = leaves_of(case.op, {"logits": given["logits"].clone()})
        logits = leaves["logits"]

        def restore() -> None:
            with torch.no_grad():
                logits.copy_(original)

        return Bound(lambda: (loss(logits, given["labels"]),), leaves, restore)

    return bind


CROSS_ENTROPY = Op(
    "cross_entropy",
    "cross-entropy, 1,000 classes",
    inputs,
    plain,
    work_of(CLASSES),
    providers=(
        Provider("fastvit", functional(lambda case: fastvit_kernels.cross_entropy)),
        Provider("eager", functional(lambda case: eager)),
        Provider("compile", functional(lambda case: compiled(eager)), slow=True),
        Provider("compile max-autotune", functional(lambda case: compiled(eager, MAX_AUTOTUNE)), slow=True),
        Provider("apex", functional(apex), "apex"),
        Provider("flash-attn", functional(flash_attn), "flash-attn"),
        Provider("quack", functional(quack), "quack-kernels"),
        Provider("liger", liger, "liger-kernel"),
    ),
    per_model=False,
)
SOFT_CROSS_ENTROPY = Op(
    "soft_cross_entropy",
    "cross-entropy of mixup's pair of labels, 21,841 classes",
    soft_inputs,
    plain_soft,
    work_of(MANY_CLASSES),
    providers=(
        Provider("fastvit", functional(lambda case: fastvit_kernels.cross_entropy)),
        Provider("eager, two losses", functional(lambda case: eager_pair)),
        Provider("eager, dense target", functional(lambda case: eager_dense)),
        Provider("timm", functional(timm), "timm"),
        Provider("compile", functional(lambda case: compiled(eager_pair)), slow=True),
        Provider("compile max-autotune", functional(lambda case: compiled(eager_pair, MAX_AUTOTUNE)), slow=True),
    ),
    per_model=False,
    constants=frozenset({"mix_weight"}),
)
