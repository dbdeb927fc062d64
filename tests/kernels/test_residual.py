from functools import partial

import pytest
import torch
from torch import Tensor

from fastvit_kernels import attention_block, dispatch, drop_path_subset, layer_norm_mlp
from fastvit_kernels.residual import draw_path_scale, merge_samples_op, split_samples_op
from tests.kernels.numerics import assert_accurate

RATE = 0.4


def half_block(x: Tensor, *, layer_scale: Tensor | None) -> Tensor:
    """A half-block whose branch is the layer scale."""
    return x + (1 if layer_scale is None else layer_scale)


def attention_inputs(width: int) -> dict[str, Tensor]:
    weights = {"qkv_weight": torch.randn(3 * width, width), "proj_weight": torch.randn(width, width)}
    biases = {"qkv_bias": torch.randn(3 * width), "proj_bias": torch.randn(width)}
    return {name: weight / width**0.5 for name, weight in weights.items()} | biases


def mlp_inputs(width: int) -> dict[str, Tensor]:
    weights = {"fc1_weight": torch.randn(2 * width, width), "fc2_weight": torch.randn(width, 2 * width)}
    biases = {"fc1_bias": torch.randn(2 * width), "fc2_bias": torch.randn(width)}
    return {name: weight / width**0.5 for name, weight in weights.items()} | biases


HALVES = {
    "attention": (partial(attention_block, heads=2, eps=1e-6), attention_inputs),
    "mlp": (partial(layer_norm_mlp, eps=1e-6), mlp_inputs),
}


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("half", list(HALVES))
def test_gradients_match_the_explicit_formulation(half: str, scaled: bool, device: torch.device) -> None:
    function, make = HALVES[half]
    inputs = {"x": torch.randn(5, 3, 16), "norm_weight": torch.rand(16), "norm_bias": torch.randn(16)} | make(16)
    if scaled:
        inputs["layer_scale"] = 0.3 + 0.1 * torch.randn(16)

    def ours(x: Tensor, layer_scale: Tensor | None = None, **parameters: Tensor) -> Tensor:
        torch.manual_seed(7)
        return drop_path_subset(partial(function, **parameters), x, layer_scale=layer_scale, drop_path=RATE)

    def explicit(x: Tensor, **parameters: Tensor) -> Tensor:
        torch.manual_seed(7)
        kept = torch.randperm(5, device=device)[:3].tolist()
        with dispatch.using("reference"):
            branch = function(x, **parameters) - x
        return torch.stack([x[i] + branch[i] * (5 / 3 if i in kept else 0) for i in range(5)])

    assert_accurate(ours, explicit, inputs, torch.float32, device)


@pytest.mark.parametrize(
    ("batch", "rate", "kept"), [(10, 0.34, 7), (4, 0.1, 4), (3, 0.9, 1), (1, 0.9, 1), (6, 0.0, 6), (0, 0.5, 0)]
)
def test_only_kept_samples_are_computed(batch: int, rate: float, kept: int) -> None:
    computed = []

    def recording(x: Tensor, *, layer_scale: Tensor | None) -> Tensor:
        computed.append(x)
        return half_block(x, layer_scale=layer_scale)

    x = torch.randn(batch, 2, 3)
    y = drop_path_subset(recording, x, drop_path=rate)
    assert [len(samples) for samples in computed] == [kept]
    changed = (y != x).flatten(1).any(1)  # [B]
    assert changed.sum() == kept
    assert torch.allclose(y[changed], x[changed] + batch / max(kept, 1))


def test_expectation_is_that_of_the_whole_branch() -> None:
    draws = torch.stack([drop_path_subset(half_block, torch.zeros(5, 1, 1), drop_path=0.5) for _ in range(4000)])
    # 2 of 5 are kept, scaled by 2.5: variance 2.5 - 1; 5 standard deviations
    assert torch.allclose(draws.mean(0), torch.ones(5, 1, 1), atol=5 * (1.5 / 4000) ** 0.5)


def test_layer_scale_is_scaled_in_float32() -> None:
    given = []

    def recording(x: Tensor, *, layer_scale: Tensor) -> Tensor:
        given.append(layer_scale)
        return x

    x = torch.randn(7, 2, 3, dtype=torch.bfloat16)
    for layer_scale in (None, torch.full((3,), 0.5, dtype=torch.bfloat16), torch.full((3,), 0.5)):
        assert drop_path_subset(recording, x, layer_scale=layer_scale, drop_path=0.5).dtype == torch.bfloat16
    expected = [torch.full((3,), value * 7 / 4) for value in (1, 0.5, 0.5)]
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


def test_second_order_gradients_of_the_subset() -> None:
    def run(x: Tensor, scale: Tensor) -> Tensor:
        torch.manual_seed(7)
        return drop_path_subset(lambda x, layer_scale: x + layer_scale * x.sin(), x, layer_scale=scale, drop_path=RATE)

    arguments = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 2, 3), (3,))]
    assert torch.autograd.gradcheck(run, arguments)
    assert torch.autograd.gradgradcheck(run, arguments)


@pytest.mark.usefixtures("implementation")
def test_compiles_and_repeats_bit_by_bit(device: torch.device) -> None:
    parameters = {"norm_weight": torch.rand(16), "norm_bias": torch.randn(16)} | mlp_inputs(16)
    parameters = {name: tensor.to(device) for name, tensor in parameters.items()}

    def run(x: Tensor) -> Tensor:
        return drop_path_subset(partial(layer_norm_mlp, eps=1e-6, **parameters), x, drop_path=RATE)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (5, 4):
        x = torch.randn(batch, 3, 16, device=device, requires_grad=True)
        results = []
        for function in (run, run, compiled):
            torch.manual_seed(7)
            y = function(x)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_registered_operators(device: torch.device) -> None:
    x, order = torch.randn(5, 2, 3, device=device, requires_grad=True), torch.randperm(5, device=device)
    torch.library.opcheck(split_samples_op, (x, order, 2))
    torch.library.opcheck(merge_samples_op, (x[:2], x[2:], order))
    assert torch.equal(merge_samples_op(*split_samples_op(x, order, 2), order), x)


@pytest.mark.gpu
def test_the_gpu_is_not_waited_for(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("does not apply: there is no GPU to wait for")
    x = torch.randn(5, 2, 3, device=device, requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        drop_path_subset(half_block, x, drop_path=RATE).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_rate_is_checked() -> None:
    with pytest.raises(ValueError, match="drop_path must be at least 0 and below 1, got 1"):
        drop_path_subset(half_block, torch.zeros(2, 1, 1), drop_path=1.0)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_kept_branches_are_scaled_so_that_the_expectation_does_not_change(rate: float) -> None:
    scale = draw_path_scale(torch.empty(20_000, 1), rate)
    assert scale is not None
    kept = scale[scale != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)))
    assert abs(len(kept) / len(scale) - (1 - rate)) < 0.02
    assert draw_path_scale(torch.empty(4, 1), 0.0) is None
