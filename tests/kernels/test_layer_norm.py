import pytest
import torch
from numerics import assert_accurate
from torch import Tensor

from fastvit_kernels import layer_norm


def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    centred = wide - wide.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return (centred / torch.sqrt(variance + eps) * weight + bias).to(x.dtype)


def inputs(*shape: int) -> dict[str, Tensor]:
    width = shape[-1]
    return {"x": torch.randn(shape), "weight": 1 + 0.2 * torch.randn(width), "bias": 0.1 * torch.randn(width)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 192), (3, 5, 769), (2, 257, 1280), (7,), (4, 33)])
def test_matches_independent_formulation(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    assert_accurate(layer_norm, plain_layer_norm, inputs(*shape), dtype, device)


@pytest.mark.parametrize("hostile", ["offset", "one huge", "constant rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hostile_rows(hostile: str, dtype: torch.dtype, device: torch.device) -> None:
    arguments = inputs(3, 5, 769)
    if hostile == "offset":
        arguments["x"] += 1000
    elif hostile == "one huge":
        arguments["x"][..., 3] = 3e4
    else:
        arguments["x"] = torch.full_like(arguments["x"], 0.5)
    condition = 100 if hostile == "offset" else 1  # a mean of 1000 is rounded, then taken from values of size 1
    assert_accurate(layer_norm, plain_layer_norm, arguments, dtype, device, condition=condition)


def test_non_contiguous_input(device: torch.device) -> None:
    arguments = inputs(5, 3, 65)
    arguments["x"] = arguments["x"].transpose(0, 1)
    assert not arguments["x"].is_contiguous()
    assert_accurate(layer_norm, plain_layer_norm, arguments, torch.float32, device)


def test_nan_stays_in_its_row(device: torch.device) -> None:
    arguments = {name: tensor.to(device) for name, tensor in inputs(4, 33).items()}
    arguments["x"][2, 5] = torch.nan
    assert layer_norm(**arguments).isnan().any(dim=-1).tolist() == [False, False, True, False]


def test_statistics_are_float32_and_parameters_may_be(device: torch.device) -> None:
    arguments = {name: tensor.to(device) for name, tensor in inputs(64, 768).items()}
    x = arguments.pop("x").bfloat16()
    y = layer_norm(x, **arguments)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer_norm(x.float(), **arguments).bfloat16())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "x must be floating point"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have a last dimension"),
        ({"weight": torch.ones(7)}, ValueError, r"weight must have shape \[8\], got \[7\]"),
        ({"bias": torch.ones(1)}, ValueError, r"bias must have shape \[8\], got \[1\]"),
        ({"bias": torch.ones(8, dtype=torch.float16)}, TypeError, "bias must be torch.float32"),
        ({"weight": torch.ones(8, device="meta")}, ValueError, "weight must be on cpu"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        layer_norm(**(inputs(2, 8) | change))
