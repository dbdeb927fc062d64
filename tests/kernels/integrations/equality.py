"""A model and its accelerated copy must give the same outputs and gradients."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastvit_kernels.integrations import Acceleration, accelerate

Run = Callable[[nn.Module], Tensor]


def randomised(model: nn.Module) -> nn.Module:
    """Libraries start biases and tokens at zero, where mistakes do not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def accelerated(model: nn.Module) -> tuple[nn.Module, Acceleration]:
    copied = copy.deepcopy(model)
    return copied, accelerate(copied)


def assert_equal(ours: nn.Module, theirs: nn.Module, run: Run, tolerance: float = 1e-5) -> None:
    """Outputs, and the gradient of every parameter, of one pass from the same random state."""
    results = []
    for model in (ours, theirs):
        model.zero_grad()
        torch.manual_seed(3)
        output = run(model)
        # a weight for each number: a plain sum has gradients that cancel in a LayerNorm
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(4)).to(output.dtype)
        (output * weights).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append((output.detach(), gradients))
    (output, gradients), (expected, expected_gradients) = results
    assert relative(output, expected) <= tolerance
    total = torch.stack([g.norm() for g in expected_gradients.values() if g is not None]).norm()
    for name, expected_gradient in expected_gradients.items():
        gradient = gradients[name]
        assert (gradient is None) == (expected_gradient is None), name
        if gradient is not None and expected_gradient is not None:
            # the gradient of a key bias is 0 but for rounding, which is relative to the others
            bound = tolerance * expected_gradient.norm() + 0.03 * tolerance * total
            assert (gradient - expected_gradient).norm() <= bound, name


def relative(ours: Tensor, expected: Tensor) -> float:
    return ((ours - expected).norm() / expected.norm()).item()


def rows(acceleration: Acceleration) -> dict[str, tuple[str, str]]:
    """path -> (runs as, left alone)"""
    return {row.path: (" + ".join(row.fused), row.left_alone) for row in acceleration.rows}


WHOLE = ("block", "")
HALVES = ("attention_block + layer_norm_mlp", "")
GATED = ("attention_block + layer_norm_swiglu", "")
