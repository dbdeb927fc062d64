from functools import partial

import pytest
import torch
from numerics import assert_accurate
from torch import Tensor

from fastvit_kernels import layer_norm_mlp

EPS = 1e-6


def plain_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    layer_scale: Tensor | None = None,
    activation: str = "gelu",
) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    centred = wide - wide.mean(dim=-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + EPS)
    normed = (normed * norm_weight + norm_bias).to(x.dtype)
    hidden = normed @ fc1_weight.T + fc1_bias
    if activation == "gelu":
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    else:
        hidden = hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3))) / 2
    branch = hidden @ fc2_weight.T + fc2_bias
    return x + (branch if layer_scale is None else branch * layer_scale)


def inputs(batch: int, tokens: int, width: int, hidden: int) -> dict[str, Tensor]:
    return {
        "x": torch.randn(batch, tokens, width),
        "norm_weight": 1 + 0.2 * torch.randn(width),
        "norm_bias": 0.1 * torch.randn(width),
        "fc1_weight": torch.randn(hidden, width) / width**0.5,
        "fc1_bias": 0.1 * torch.randn(hidden),
        "fc2_weight": torch.randn(width, hidden) / hidden**0.5,
        "fc2_bias": 0.1 * torch.randn(width),
    }


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 1, 64, 256), (3, 5, 80, 100), (2, 257, 33, 65)])
@pytest.mark.parametrize("scaled", [False, True])
def test_matches_independent_formulation(
    shape: tuple[int, int, int, int], activation: str, scaled: bool, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = inputs(*shape)
    if scaled:
        arguments["layer_scale"] = 0.1 + 0.05 * torch.randn(shape[2])
    ours = partial(layer_norm_mlp, eps=EPS, activation=activation)
    assert_accurate(ours, partial(plain_mlp, activation=activation), arguments, dtype, device)


def test_the_two_activations_differ(device: torch.device) -> None:
    arguments = {name: tensor.double().to(device) for name, tensor in inputs(2, 5, 16, 64).items()}
    erf = layer_norm_mlp(**arguments, eps=EPS, activation="gelu")
    tanh = layer_norm_mlp(**arguments, eps=EPS, activation="gelu_tanh")
    assert 1e-6 < (erf - tanh).abs().max().item() < 1e-2


@pytest.mark.usefixtures("implementation")
def test_non_contiguous_input(device: torch.device) -> None:
    arguments = inputs(3, 5, 16, 40)
    arguments["x"] = torch.randn(5, 3, 16).transpose(0, 1)
    arguments["fc1_weight"] = arguments["fc1_weight"].T.contiguous().T
    assert_accurate(partial(layer_norm_mlp, eps=EPS), plain_mlp, arguments, torch.float32, device)


@pytest.mark.usefixtures("implementation")
def test_drop_path_keeps_or_drops_whole_samples(device: torch.device) -> None:
    arguments = {name: tensor.to(device) for name, tensor in inputs(4000, 2, 8, 16).items()}
    x = arguments["x"]
    branch = layer_norm_mlp(**arguments, eps=EPS) - x
    dropped = layer_norm_mlp(**arguments, eps=EPS, drop_path=0.2) - x
    kept = dropped.flatten(1).abs().amax(dim=1) > 0  # [B]
    assert torch.allclose(dropped[kept], branch[kept] / 0.8, atol=1e-5)
    assert kept.float().mean().item() == pytest.approx(0.8, abs=0.032)  # 5 standard deviations


@pytest.mark.usefixtures("implementation")
def test_dropout_acts_on_activations_and_output(device: torch.device) -> None:
    arguments = {name: tensor.to(device) for name, tensor in inputs(500, 5, 8, 8).items()}
    # an identity fc2: an output survives when its activation and it are both kept, scaled by 1 / 0.6 twice
    arguments |= {"fc2_weight": torch.eye(8, device=device), "fc2_bias": torch.zeros(8, device=device)}
    x = arguments["x"]
    branch = layer_norm_mlp(**arguments, eps=EPS) - x
    out = layer_norm_mlp(**arguments, eps=EPS, dropout=0.4) - x
    kept = out != 0
    assert torch.allclose(out[kept], branch[kept] / 0.36, atol=1e-5)
    assert kept.float().mean().item() == pytest.approx(0.36, abs=0.018)  # 5 standard deviations


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 8)}, ValueError, r"x must have shape \[B, N, D\]"),
        ({"x": torch.zeros(2, 3, 8, dtype=torch.int8)}, TypeError, "x must be floating point"),
        ({"norm_weight": torch.ones(1)}, ValueError, "norm_weight must have shape"),
        ({"norm_bias": torch.ones(9)}, ValueError, "norm_bias must have shape"),
        ({"fc1_weight": torch.zeros(16, 9)}, ValueError, r"fc1_weight must have shape \[16, 8\]"),
        ({"fc1_bias": torch.zeros(8)}, ValueError, r"fc1_bias must have shape \[16\]"),
        ({"fc2_weight": torch.zeros(16, 8)}, ValueError, r"fc2_weight must have shape \[8, 16\]"),
        ({"fc2_bias": torch.zeros(8, dtype=torch.bfloat16)}, TypeError, "fc2_bias must be torch.float32"),
        ({"layer_scale": torch.zeros(1)}, ValueError, "layer_scale must have shape"),
        ({"activation": "relu"}, ValueError, "activation must be one of gelu, gelu_tanh, got 'relu'"),
        ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1"),
        ({"drop_path": -1.0}, ValueError, "drop_path must be at least 0"),
    ],
)
def test_errors_name_the_argument(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        layer_norm_mlp(**({**inputs(2, 3, 8, 16), "eps": EPS} | change))
