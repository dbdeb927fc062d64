import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastvit_kernels import cross_entropy, dispatch, sigmoid_cross_entropy
from fastvit_kernels.cross_entropy import op
from tests.in_full import IN_FULL, in_full
from tests.kernels.numerics import assert_accurate

pytestmark = pytest.mark.usefixtures("implementation")

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


KINDS = ["index", "pair", "soft", "soft pair"]


def labelled(kind: str, batch: int, classes: int, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Label arguments of one kind, and the dense target that they mean."""
    if kind.startswith("soft"):
        dense = arguments = torch.rand(2, batch, classes, device=device)
    else:
        arguments = torch.randint(0, classes, (2, batch), device=device)
        dense = F.one_hot(arguments, classes).float()
    if not kind.endswith("pair"):
        return {"labels": arguments[0]}, dense[0]
    share = torch.rand(batch, device=device)
    target = share[:, None] * dense[0] + (1 - share[:, None]) * dense[1]
    return {"labels": arguments[0], "labels_b": arguments[1], "mix_weight": share}, target


def assert_loss_accurate(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    logits: Tensor,
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
    condition: float = 1.0,
) -> None:
    arguments, target = labelled(kind, *logits.shape, device)
    assert_accurate(
        partial(ours, **arguments, label_smoothing=SMOOTHING, reduction="none"),
        partial(plain, target=smooth(target)),
        {"logits": logits},
        dtype,
        device,
        condition=condition,
    )


QUICK = [(kind, *case) for kind in KINDS for case in [((3, 10), torch.bfloat16), ((2, 5001), torch.float32)]]
QUICK += [("index", (1, 1), torch.float32), ("index", (2, 5001), torch.bfloat16)]
QUICK += [(kind, (3, 10), torch.float16) for kind in ("index", "soft pair")]
FULL = itertools.product(KINDS, [(1, 1), (3, 10), (2, 5001)], [torch.float32, torch.bfloat16, torch.float16])


@pytest.mark.parametrize(("kind", "shape", "dtype"), QUICK + [in_full(*case) for case in FULL if case not in QUICK])
@pytest.mark.parametrize(("ours", "plain"), PAIRS)
def test_matches_independent_formulation(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    kind: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    assert_loss_accurate(ours, plain, 3 * torch.randn(shape), kind, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("ours", "plain"), PAIRS)
@pytest.mark.parametrize("classes", [1000, 21843, 29593])
@pytest.mark.parametrize("kind", KINDS)
def test_production_sizes(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    classes: int,
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    if device.type == "cpu":
        pytest.skip("too slow without a GPU")
    assert_loss_accurate(ours, plain, 3 * torch.randn(1024, classes), kind, dtype, device)


@settings(
    max_examples=15 if IN_FULL else 8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    batch=st.integers(1, 5),
    classes=st.integers(1, 400),
    kind=st.sampled_from(KINDS),
    pair=st.sampled_from(PAIRS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape(
    batch: int,
    classes: int,
    kind: str,
    pair: tuple[Callable[..., Tensor], Callable[..., Tensor]],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    assert_loss_accurate(*pair, 3 * torch.randn(batch, classes), kind, dtype, device)


@pytest.mark.parametrize("hostile", ["offset", "one huge", "constant", "falling", "rising"])
@pytest.mark.parametrize("kind", ["index", "soft"])
@pytest.mark.parametrize(("ours", "plain"), PAIRS)
def test_hostile_logits(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], hostile: str, kind: str, device: torch.device
) -> None:
    logits = torch.randn(1, 9000)  # three blocks of columns
    if hostile == "offset":
        logits += 1000
    elif hostile == "one huge":
        logits[:, 4500] = 3e4
    elif hostile == "constant":
        logits = torch.full_like(logits, 0.5)
    else:  # the largest logit is in the first block, or a new one in each
        logits = torch.linspace(-50, 50, 9000).mul(1 if hostile == "rising" else -1)[None]
    # the gradient of the one huge logit is 1 less the sum of a target of 9000 numbers
    assert_loss_accurate(ours, plain, logits, kind, torch.float32, device, condition=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["index", "soft pair"])
def test_z_loss(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    arguments, target = labelled(kind, 3, 41, device)

    def plain(logits: Tensor) -> Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return plain_softmax(logits, target) + 0.01 * wide.exp().sum(dim=1).log().square()

    ours = partial(cross_entropy, **arguments, z_loss=0.01, reduction="none")
    assert_accurate(ours, plain, {"logits": 3 * torch.randn(3, 41)}, dtype, device)
    with pytest.raises(ValueError, match="z_loss must be at least 0 and finite, got -1"):
        cross_entropy(torch.rand(2, 3), INDEX, z_loss=-1)


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


@pytest.mark.parametrize("layout", ["transposed", "rows apart", "repeated rows"])
@pytest.mark.parametrize("kind", ["index", "soft pair"])
def test_non_contiguous_arguments(layout: str, kind: str, device: torch.device) -> None:
    arguments, target = labelled(kind, 7, 5, device)
    if kind == "index":
        arguments["labels"] = arguments["labels"].repeat_interleave(2)[::2]
    else:
        for name in ("labels", "labels_b"):
            arguments[name] = arguments[name].T.contiguous().T
        arguments["mix_weight"] = arguments["mix_weight"].repeat_interleave(3)[::3]
    logits = {
        "transposed": torch.randn(5, 7).T,
        "rows apart": torch.randn(7, 16)[:, 3:8],
        "repeated rows": torch.randn(5).expand(7, 5),
    }[layout]
    ours = partial(cross_entropy, **arguments, reduction="none")
    assert_accurate(ours, partial(plain_softmax, target=target), {"logits": logits}, torch.float32, device)


def test_labels_of_other_dtypes(device: torch.device) -> None:
    logits = torch.randn(3, 9, device=device, dtype=torch.bfloat16)
    arguments = labelled("soft pair", 3, 9, device)[0]
    expected = cross_entropy(logits, **arguments)
    assert torch.allclose(cross_entropy(logits, **{n: t.double() for n, t in arguments.items()}), expected)
    half = {n: t.bfloat16() for n, t in arguments.items()}
    expected = cross_entropy(logits, **{n: t.float() for n, t in half.items()})
    assert torch.equal(cross_entropy(logits, **half), expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_of_any_use_of_the_losses(
    loss: Callable[..., Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    logits = torch.randn(6, 37, device=device, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 37, (6,), device=device)
    weights = torch.tensor([1.0, 0.0, 1.0, 2.0, -3.0, 1.0], device=device)
    uses = {
        "mean": lambda: loss(logits, labels),
        "mean of samples": lambda: loss(logits, labels, reduction="none").mean(),
        "weighted mean": lambda: (loss(logits, labels, reduction="none") * weights).mean(),
        "sum": lambda: loss(logits, labels, reduction="none").sum(),
        "scaled": lambda: 1024 * loss(logits, labels),
        "not used": lambda: 0 * loss(logits, labels),
    }
    rows = torch.autograd.grad(uses["sum"](), logits)[0].float()  # the gradient of each row's own loss
    shares = {
        **dict.fromkeys(("mean", "mean of samples"), torch.full((6,), 1 / 6)),
        "weighted mean": weights.cpu() / 6,
        "sum": torch.ones(6),
        "scaled": torch.full((6,), 1024 / 6),
        "not used": torch.zeros(6),
    }
    for name, use in uses.items():
        gradient = torch.autograd.grad(use(), logits)[0]
        assert gradient.dtype == dtype
        expected = shares[name].to(device)[:, None] * rows
        tolerance = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            gradient.float(), expected, rtol=tolerance, atol=1e-7 if dtype != torch.half else 1e-6
        )


@pytest.mark.parametrize("loss", LOSSES)
def test_backward_twice(loss: Callable[..., Tensor], device: torch.device) -> None:
    logits = torch.randn(3, 37, device=device, requires_grad=True)
    losses = loss(logits, torch.tensor([0, 1, 36], device=device), reduction="none")
    # the first gradient is of the mean, written in the forward pass; both must survive the other
    first, second = (
        torch.autograd.grad(losses, logits, losses.new_tensor(upstream), retain_graph=True)[0]
        for upstream in ([1 / 3, 1 / 3, 1 / 3], [2.0, -1.0, 1 / 3])
    )
    factors = torch.tensor([[6.0], [-3.0], [1.0]], device=device)
    torch.testing.assert_close(factors * first, second)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sigmoid", [False, True])
def test_backward_writes_only_rows_that_are_not_of_a_mean(
    implementation: str, kind: str, sigmoid: bool, device: torch.device
) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: the operators are Triton's")
    logits = torch.randn(4, 37, device=device)
    labels = labelled(kind, 4, 37, device)[0]
    inputs = (logits, labels["labels"], labels.get("labels_b"), labels.get("mix_weight"))
    _, statistics, of_mean = op.cross_entropy_op(*inputs, SMOOTHING, 0.0, sigmoid, True)
    upstream = torch.tensor([0.25, 1.0, torch.nan, 0.25], device=device)
    gradient = torch.full_like(logits, 77.0)
    op.correct_op(gradient, upstream, *inputs, statistics, SMOOTHING, 0.0)
    anew = op.cross_entropy_backward_op(upstream, *inputs, statistics, SMOOTHING, 0.0)
    assert (gradient[[0, 3]] == 77).all() and torch.equal(gradient[1], anew[1]) and gradient[2].isnan().all()
    # and for rows of a mean both passes write the same bits
    assert torch.equal(anew[[0, 3]], of_mean[[0, 3]])
    torch.testing.assert_close(anew[1], 4 * of_mean[1])


def test_gradient_of_a_mean_is_known_by_equality(device: torch.device) -> None:
    for batch in (*range(1, 70), 100, 1000, 1024, 12345):
        losses = torch.zeros(batch, device=device, requires_grad=True)
        weights = torch.ones(batch, device=device)
        for mean in (losses.mean(), (losses * weights).mean()):
            upstream = torch.autograd.grad(mean, losses)[0]
            assert torch.equal(upstream, torch.full_like(upstream, 1 / batch))  # as the kernels are given it


@pytest.mark.parametrize("sigmoid", [False, True])
def test_index_that_does_not_exist_gives_nan(implementation: str, sigmoid: bool, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: the operators are Triton's")
    logits = torch.randn(5, 9, device=device)
    labels = torch.tensor([0, 9, -1, 2, 8], device=device)
    wrong = [False, True, True, False, False]
    losses, _, gradient = op.cross_entropy_op(logits, labels, None, None, 0.0, 0.0, sigmoid, True)
    assert (
        losses.isnan().tolist() == gradient.isnan().all(dim=1).tolist() == gradient.isnan().any(dim=1).tolist() == wrong
    )
    share = torch.full((5,), 0.5, device=device)
    losses, _, gradient = op.cross_entropy_op(logits, labels.abs() % 9, labels, share, 0.0, 0.0, sigmoid, True)
    assert losses.isnan().tolist() == gradient.isnan().all(dim=1).tolist() == wrong


@pytest.mark.parametrize("loss", LOSSES)
def test_nan_stays_in_its_row(loss: Callable[..., Tensor], device: torch.device) -> None:
    logits = torch.randn(4, 33, device=device)
    logits[2, 5] = torch.nan
    logits.requires_grad_()
    losses = loss(logits, torch.tensor([1, 2, 3, 4], device=device), reduction="none")
    losses.mean().backward()
    assert losses.isnan().tolist() == logits.grad.isnan().any(dim=1).tolist() == [False, False, True, False]


def test_small_sigmoid_losses_add_up(implementation: str, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: PyTorch's own loss is 1 % off here")
    logits, labels = torch.full((1, 1000), -10.0, device=device), torch.tensor([7], device=device)
    logits[0, 7] = 12.0
    exact = 999 * math.log1p(math.exp(-10)) + math.log1p(math.exp(-12))
    assert sigmoid_cross_entropy(logits, labels).item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_empty_batch(loss: Callable[..., Tensor], device: torch.device) -> None:
    logits = torch.zeros(0, 5, device=device, requires_grad=True)
    losses = loss(logits, torch.zeros(0, dtype=torch.int64, device=device), reduction="none")
    losses.sum().backward()
    assert losses.shape == (0,) and logits.grad.shape == (0, 5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(3, 5001), pytest.param((1024, 21843), marks=pytest.mark.gpu)])
def test_gradients_are_the_same_bits_in_every_run(
    loss: Callable[..., Tensor], shape: tuple[int, int], device: torch.device
) -> None:
    if device.type == "cpu" and shape[0] > 3:
        pytest.skip("too slow without a GPU")
    logits = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, shape[1], shape[:1], device=device)
    upstream = torch.randn(shape[0], device=device)

    def run() -> Tensor:
        return torch.autograd.grad(loss(logits, labels, reduction="none"), logits, upstream)[0]

    assert torch.equal(run(), run())


@pytest.mark.parametrize(("loss", "kind"), [(cross_entropy, "index"), (sigmoid_cross_entropy, "soft pair")])
def test_compiles_without_graph_break(loss: Callable[..., Tensor], kind: str, device: torch.device) -> None:
    compiled = torch.compile(
        lambda logits, **labels: loss(logits, **labels, label_smoothing=SMOOTHING).sin(),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for batch in (3, 2):
        labels = labelled(kind, batch, 10, device)[0]
        logits = torch.randn(batch, 10, device=device, requires_grad=True)
        result, expected = compiled(logits, **labels), loss(logits, **labels, label_smoothing=SMOOTHING).sin()
        assert torch.equal(result, expected)
        gradients = [torch.autograd.grad(output, logits)[0] for output in (result, expected)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("kind", "sigmoid"), [("index", False), ("pair", True), ("soft", True), ("soft pair", False)])
def test_registered_operators(implementation: str, kind: str, sigmoid: bool, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: the operators are Triton's")
    logits = torch.randn(3, 10, device=device, requires_grad=True)
    labels = labelled(kind, 3, 10, device)[0]
    inputs = (logits, labels["labels"], labels.get("labels_b"), labels.get("mix_weight"))
    torch.library.opcheck(op.cross_entropy_op, (*inputs, SMOOTHING, 0.1, sigmoid, False))
    losses, statistics, gradient = op.cross_entropy_op(*inputs, SMOOTHING, 0.1, sigmoid, True)
    assert not (statistics.requires_grad or gradient.requires_grad)
    inputs = (torch.rand(3, device=device), logits.detach(), *inputs[1:], statistics, SMOOTHING, 0.1)
    torch.library.opcheck(op.cross_entropy_backward_op, inputs)
    torch.library.opcheck(op.correct_op, (gradient, *inputs))


@pytest.mark.parametrize("loss", LOSSES)
def test_second_derivative(implementation: str, loss: Callable[..., Tensor], device: torch.device) -> None:
    logits = torch.randn(3, 10, device=device, requires_grad=True)
    output = loss(logits, torch.tensor([1, 2, 3], device=device))
    gradient = torch.autograd.grad(output, logits, create_graph=True)[0]
    if implementation == "triton":
        with pytest.raises(NotImplementedError, match="cross_entropy has no second derivative"):
            gradient.sum().backward()
    else:
        gradient.square().sum().backward()
        assert logits.grad.abs().sum() > 0


def test_float64_is_for_the_reference(implementation: str, device: torch.device) -> None:
    logits, labels = torch.randn(3, 10, device=device).double(), torch.tensor([1, 2, 3], device=device)
    if implementation == "triton":
        with pytest.raises(RuntimeError, match=r"the kernels take .* not torch.float64"):
            cross_entropy(logits, labels)
    with dispatch.using("auto"):
        assert cross_entropy(logits, labels).dtype == torch.float64


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
        ({"logits": torch.rand(2, 0)}, ValueError, r"logits must have shape \[B, C\]"),
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
