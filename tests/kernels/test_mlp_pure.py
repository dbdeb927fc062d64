from functools import partial

import pytest
import torch
from torch import Tensor

from fastvit_kernels import mlp
from fastvit_kernels.gemm import config
from fastvit_kernels.mlp import pure
from tests.in_full import in_full
from tests.kernels.numerics import assert_accurate

pytestmark = pytest.mark.usefixtures("implementation")

NAMES = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


def plain_mlp(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, activation: str
) -> Tensor:
    hidden = x @ fc1_weight.T + fc1_bias
    if activation == "gelu":
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    else:
        hidden = hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3))) / 2
    return hidden @ fc2_weight.T + fc2_bias


def inputs(*shape: int, hidden: int = 72, width: int | None = None) -> dict[str, Tensor]:
    width = width or shape[-1]
    tensors = (
        torch.randn(shape),
        torch.randn(hidden, shape[-1]) / shape[-1] ** 0.5,
        0.1 * torch.randn(hidden),
        torch.randn(width, hidden) / hidden**0.5,
        0.1 * torch.randn(width),
    )
    return dict(zip(NAMES, tensors, strict=True))


def leaves(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: tensor.to(device, dtype).requires_grad_() for name, tensor in inputs(3, 5, 40).items()}


def run(arguments: dict[str, Tensor], learned: tuple[str, ...] = NAMES) -> list[Tensor]:
    y = mlp(**arguments)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y, *torch.autograd.grad(y, [arguments[name] for name in learned], cotangent)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, in_full(torch.float16)])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("products", [(), config.PRODUCTS], ids=["PyTorch", "Triton"])
def test_matches_independent_formulation(
    products: tuple[config.Product, ...], activation: str, dtype: torch.dtype, device: torch.device
) -> None:
    ours, plain = (partial(function, activation=activation) for function in (mlp, plain_mlp))
    for tensors in (inputs(1, 33), inputs(3, 5, 40), inputs(2, 2, 3, 17, hidden=65, width=24)):
        with config.triton_for(*products):
            assert_accurate(ours, plain, tensors, dtype, device)


def test_non_contiguous_inputs(device: torch.device) -> None:
    tensors = inputs(4, 6, 24)
    tensors["x"] = tensors["x"].transpose(0, 1)
    tensors["fc1_weight"] = tensors["fc1_weight"].T.contiguous().T
    assert_accurate(mlp, partial(plain_mlp, activation="gelu"), tensors, torch.float32, device)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_one_input_alone(name: str, device: torch.device) -> None:
    arguments = leaves(device)
    everything = dict(zip(NAMES, run(arguments)[1:], strict=True))
    for other in set(NAMES) - {name}:
        arguments[other] = arguments[other].detach()
    assert torch.equal(run(arguments, (name,))[1], everything[name])


def test_autocast_acts_as_on_linear_layers(device: torch.device) -> None:
    arguments = leaves(device)
    full = run(arguments)
    with torch.autocast(device.type, torch.bfloat16):
        results = run(arguments)
    assert [t.dtype for t in results] == [torch.bfloat16] + [torch.float32] * 5
    for result, expected in zip(results, full, strict=True):
        assert 0 < (result - expected).norm() / expected.norm() < 0.02


def test_nothing_is_kept_without_a_gradient(implementation: str, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: a promise of the kernels alone")
    arguments = leaves(device)
    y, pre = pure.mlp_op(*arguments.values(), False, True)
    with torch.no_grad():
        assert torch.equal(mlp(**arguments), y)
        assert pure.mlp_op(*arguments.values(), False, False)[1].numel() == 0 < pre.numel()


def test_registered_operator(implementation: str, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: the operator is Triton's")
    torch.library.opcheck(pure.mlp_op, (*leaves(device).values(), False, True))


def test_compiles_without_graph_break(device: torch.device) -> None:
    arguments = leaves(device)
    compiled = torch.compile(lambda **tensors: mlp(**tensors).sin(), fullgraph=True, backend="aot_eager")
    results = [function(**arguments) for function in (compiled, lambda **tensors: mlp(**tensors).sin())]
    torch.testing.assert_close(*results)
    for pair in zip(*(torch.autograd.grad(y.sum(), list(arguments.values())) for y in results), strict=True):
        torch.testing.assert_close(*pair)


def test_empty_batch_and_equal_bits_in_two_runs(device: torch.device) -> None:
    arguments = leaves(device, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(run(arguments), run(arguments), strict=True))
    arguments["x"] = arguments["x"][:0].detach().requires_grad_()
    y, *gradients = run(arguments)
    assert y.shape == (0, 5, 40) and all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.ones(2, 4, 39)}, ValueError, r"fc1_weight must have shape \[72, 39\], got \[72, 40\]"),
        ({"x": torch.ones(2, 40, dtype=torch.int64)}, TypeError, "x must be floating point"),
        ({"x": torch.ones(())}, ValueError, "x must have shape"),
        ({"fc2_bias": torch.zeros(3)}, ValueError, r"fc2_bias must have shape \[40\], got \[3\]"),
        ({"fc1_bias": torch.zeros(72, dtype=torch.float64)}, TypeError, "fc1_bias must be torch.float32"),
        ({"activation": "relu"}, ValueError, "activation must be one of gelu, gelu_tanh, got 'relu'"),
    ],
)
def test_wrong_arguments(change: dict[str, Tensor], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        mlp(**inputs(2, 4, 40) | change)
