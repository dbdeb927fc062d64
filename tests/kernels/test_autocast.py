"""Under autocast every operation with products takes what F.linear takes: any floating input, any floating weights."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels import (
    attention_block,
    layer_norm_mlp,
    layer_norm_swiglu,
    mlp,
    swiglu_mlp,
    transformer_block,
)
from tests.in_full import in_full

pytestmark = pytest.mark.usefixtures("implementation")

WIDTH, HIDDEN = 16, 24
NORM, QKV, PROJ = (WIDTH,), (3 * WIDTH, WIDTH), (WIDTH, WIDTH)
FC1, FC2, GATED = (HIDDEN, WIDTH), (WIDTH, HIDDEN), (2 * HIDDEN, WIDTH)
# The operation, the shapes of its weights, each followed by a bias, and whether it adds a residual. [D]: of a norm.
OPERATIONS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...], bool]] = {
    "mlp": (mlp, (FC1, FC2), False),
    "swiglu_mlp": (swiglu_mlp, (GATED, FC2), False),
    "layer_norm_mlp": (partial(layer_norm_mlp, eps=1e-6), (NORM, FC1, FC2), True),
    "layer_norm_swiglu": (partial(layer_norm_swiglu, eps=1e-6), (NORM, GATED, FC2), True),
    "attention_block": (partial(attention_block, heads=2, eps=1e-6), (NORM, QKV, PROJ), True),
    "transformer_block": (partial(transformer_block, heads=2, eps=1e-6), (NORM, QKV, PROJ, NORM, FC1, FC2), True),
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [(BF16, FP32, BF16), (FP16, FP32, FP16), (FP32, BF16, BF16), (FP16, FP32, BF16), (BF16, FP16, FP16)]
QUICK = [(name, *CASES[0]) for name in OPERATIONS] + [("mlp", *case) for case in CASES[1:3]]
QUICK += [("layer_norm_swiglu", *CASES[3]), ("attention_block", *CASES[4])]
FULL = [(name, *case) for name in OPERATIONS for case in CASES]


def tensors(name: str, of_x: torch.dtype, of_weights: torch.dtype, device: torch.device) -> list[Tensor]:
    x = torch.randn(2, 3, WIDTH)
    made = [(x, of_x)]
    for shape in OPERATIONS[name][1]:
        is_norm = shape == NORM
        weight = 1 + 0.1 * torch.randn(shape) if is_norm else torch.randn(shape) / shape[1] ** 0.5
        made += [
            (weight, FP32 if is_norm else of_weights),
            (0.1 * torch.randn(shape[0]), FP32 if is_norm else of_weights),
        ]
    return [tensor.to(device, dtype).requires_grad_() for tensor, dtype in made]


def with_gradients(operation: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    y = operation(*inputs)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), inputs)]


@pytest.mark.parametrize(
    ("name", "of_x", "of_weights", "low"), QUICK + [in_full(*case) for case in FULL if case not in QUICK]
)
def test_as_linear(
    name: str, of_x: torch.dtype, of_weights: torch.dtype, low: torch.dtype, device: torch.device
) -> None:
    operation, _, adds = OPERATIONS[name]
    inputs = tensors(name, of_x, of_weights, device)
    with torch.autocast(device.type, low):
        found = with_gradients(operation, inputs)
        product = F.linear(inputs[0], inputs[-2].T.contiguous())  # PyTorch's own takes them, and gives its dtype
        added = inputs[0] + product[..., :WIDTH]  # float32 of float16 and bfloat16
    exact = with_gradients(operation, [tensor.detach().float().requires_grad_() for tensor in inputs])
    assert product.dtype == low
    assert found[0].dtype == (added.dtype if adds else low)
    assert [gradient.dtype for gradient in found[1:]] == [tensor.dtype for tensor in inputs]
    for one, expected in zip(found, exact, strict=True):
        assert (one.float() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_autocast_leaves_alone_is_refused(name: str, device: torch.device) -> None:
    operation = OPERATIONS[name][0]
    inputs = tensors(name, BF16, FP32, device)
    with pytest.raises(TypeError, match="must be torch.bfloat16 like the tensor it acts on, got torch.float32"):
        operation(*inputs)
    inputs[-2] = inputs[-2].double()
    with torch.autocast(device.type, BF16), pytest.raises(TypeError, match="fc2_weight|proj_weight"):
        operation(*inputs)
