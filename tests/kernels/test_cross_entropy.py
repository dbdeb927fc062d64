import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_accurate
from torch import Tensor

from fastvit_kernels import cross_entropy, sigmoid_cross_entropy

LOSSES = [cross_entropy, sigmoid_cross_entropy]
SMOOTHING = 0.1


def plain_softmax(logits: Tensor, target: Tensor) -> Tensor:
    """logsumexp(x) * sum(t) - <t, x>, a loss a sample."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    shifted = logits - logits.amax(dim=1, keepdim=True)
    return (shifted.exp().sum(dim=1).log() * target.sum(dim=1)) - (target * shifted).sum(dim=1)


def plain_sigmoid(logits: Tensor, target: Tensor) -> Tensor:
    """sum of softplus(x) - t x, a loss a sample."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return (F.softplus(logits) - target * logits).sum(dim=1)


PAIRS = [(cross_entropy, plain_softmax), (sigmoid_cross_entropy, plain_sigmoid)]


def smooth(target: Tensor) -> Tensor:
    return (1 - SMOOTHING) * target + SMOOTHING / target.shape[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ours", "plain"), PAIRS)
@pytest.mark.parametrize(("batch", "classes"), [(1, 1), (3, 10), (5, 1001)])
@pytest.mark.parametrize("kind", ["index", "soft", "pair"])
def test_matches_independent_formulation(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    batch: int,
    classes: int,
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    labels = torch.randint(0, classes, (batch,), device=device)
    onehot = F.one_hot(labels, classes).float()
    if kind == "index":
        arguments, target = {"labels": labels}, onehot
    elif kind == "soft":
        target = torch.rand(batch, classes, device=device)
        arguments = {"labels": target}
    else:
        labels_b, share = torch.randint(0, classes, (batch,), device=device), torch.rand(batch, device=device)
        arguments = {"labels": labels, "labels_b": labels_b, "mix_weight": share}
        target = share[:, None] * onehot + (1 - share[:, None]) * F.one_hot(labels_b, classes)
    assert_accurate(
        partial(ours, **arguments, label_smoothing=SMOOTHING, reduction="none"),
        partial(plain, target=smooth(target)),
        {"logits": 3 * torch.randn(batch, classes)},
        dtype,
        device,
    )


def test_values_by_hand(device: torch.device) -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]], device=device)  # softmax 1/4, 3/4; sigmoid 1/2, 3/4
    labels = torch.tensor([1], device=device)
    assert cross_entropy(logits, labels).item() == pytest.approx(-math.log(3 / 4))
    assert sigmoid_cross_entropy(logits, labels).item() == pytest.approx(-math.log(1 / 2) - math.log(3 / 4))
    smoothed = cross_entropy(logits, labels, label_smoothing=0.2).item()
    assert smoothed == pytest.approx(-0.1 * math.log(1 / 4) - 0.9 * math.log(3 / 4))
    smoothed = sigmoid_cross_entropy(logits, labels, label_smoothing=0.2).item()
    assert smoothed == pytest.approx(-math.log(1 / 2) - 0.9 * math.log(3 / 4) - 0.1 * math.log(1 / 4))


def test_softmax_agrees_with_pytorch(device: torch.device) -> None:
    logits, labels = torch.randn(7, 11, device=device), torch.randint(0, 11, (7,), device=device)
    expected = F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
    assert torch.allclose(cross_entropy(logits, labels, label_smoothing=SMOOTHING), expected, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_mixup_pair_equals_dense_labels(loss: Callable[..., Tensor], device: torch.device) -> None:
    logits = torch.randn(6, 9, device=device, dtype=torch.bfloat16)
    labels, labels_b = torch.randint(0, 9, (2, 6), device=device)
    share = torch.rand(6, device=device)
    dense = share[:, None] * F.one_hot(labels, 9) + (1 - share[:, None]) * F.one_hot(labels_b, 9)
    pair = partial(loss, logits, label_smoothing=SMOOTHING, reduction="none")
    assert torch.allclose(pair(labels, labels_b=labels_b, mix_weight=share), pair(dense), atol=1e-5)
    soft = pair(F.one_hot(labels, 9).float(), labels_b=F.one_hot(labels_b, 9).float(), mix_weight=share)
    assert torch.allclose(soft, pair(dense), atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_reductions_and_dtypes(loss: Callable[..., Tensor], device: torch.device) -> None:
    logits = torch.randn(4, 5, device=device, dtype=torch.bfloat16)
    labels = torch.randint(0, 5, (4,), device=device)
    losses = loss(logits, labels, reduction="none")
    assert losses.shape == (4,) and losses.dtype == torch.float32
    assert torch.allclose(loss(logits, labels), losses.mean())


@pytest.mark.parametrize("loss", LOSSES)
def test_large_logits_stay_finite(loss: Callable[..., Tensor], device: torch.device) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], device=device)
    assert loss(logits, torch.tensor([0], device=device)).item() == pytest.approx(
        0.0 if loss is LOSSES[0] else math.log(2)
    )
    assert loss(logits, torch.tensor([1], device=device)).item() > 1e4


def test_non_contiguous_logits(device: torch.device) -> None:
    labels = torch.randint(0, 5, (7,), device=device)
    ours = partial(cross_entropy, labels=labels, reduction="none")
    plain = partial(plain_softmax, target=F.one_hot(labels, 5))
    assert_accurate(ours, plain, {"logits": torch.randn(5, 7).T}, torch.float32, device)


def test_labels_get_no_gradient(device: torch.device) -> None:
    logits = torch.randn(2, 3, device=device, requires_grad=True)
    labels = torch.rand(2, 3, device=device, requires_grad=True)
    cross_entropy(logits, labels).backward()
    assert logits.grad is not None and labels.grad is None


INDEX, SOFT = torch.tensor([0, 2]), torch.rand(2, 3)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.tensor([0, 3])}, ValueError, r"labels must lie in 0..2, got values from 0 to 3"),
        ({"labels": torch.tensor([-1, 0])}, ValueError, r"labels must lie in 0..2, got values from -1 to 0"),
        ({"labels_b": torch.tensor([7, 0]), "mix_weight": torch.rand(2)}, ValueError, "labels_b must lie in 0..2"),
        ({"labels": INDEX.int()}, TypeError, "labels must be int64 class indices or floating"),
        ({"labels": torch.tensor([0])}, ValueError, r"labels of torch.int64 must have shape \[2\], got \[1\]"),
        ({"labels": torch.rand(2, 4)}, ValueError, r"labels of torch.float32 must have shape \[2, 3\], got \[2, 4\]"),
        ({"labels": torch.rand(2)}, ValueError, "labels of torch.float32 must have shape"),
        ({"logits": torch.rand(3)}, ValueError, r"logits must have shape \[B, C\]"),
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "logits must be floating"),
        ({"mix_weight": torch.rand(2)}, ValueError, "labels_b and mix_weight must be given together"),
        ({"labels_b": INDEX}, ValueError, "labels_b and mix_weight must be given together"),
        ({"labels_b": SOFT, "mix_weight": torch.rand(2)}, ValueError, "labels and labels_b must both be"),
        ({"labels_b": INDEX, "mix_weight": torch.rand(2, 1)}, ValueError, r"mix_weight must have shape \[2\]"),
        ({"labels_b": INDEX, "mix_weight": INDEX}, TypeError, "mix_weight must be floating"),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing must be at least 0 and below 1"),
        ({"reduction": "sum"}, ValueError, "reduction must be 'mean' or 'none', got 'sum'"),
    ],
)
def test_errors_name_the_argument(
    loss: Callable[..., Tensor], change: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        loss(**({"logits": torch.rand(2, 3), "labels": INDEX} | change))
