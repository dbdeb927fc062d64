from functools import partial

import pytest
import torch
from numerics import assert_accurate
from torch import Tensor

from fastvit_kernels import attention_block

pytestmark = pytest.mark.usefixtures("implementation")

BLOCK = {"heads": 2, "eps": 1e-6}


def plain_attention(qkv: Tensor) -> Tensor:
    head_dim = qkv.shape[-1]
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # [B, N, H, d]
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / head_dim**0.5
    exponents = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    probabilities = exponents / exponents.sum(dim=-1, keepdim=True)
    return torch.einsum("bhnm,bmhd->bnhd", probabilities, v).reshape(*qkv.shape[:2], -1)


def plain_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    layer_scale: Tensor | None = None,
) -> Tensor:
    batch, tokens, width = x.shape
    heads = BLOCK["heads"]
    wide = x if x.dtype == torch.float64 else x.float()
    centred = wide - wide.mean(dim=-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + BLOCK["eps"])
    normed = (normed * norm_weight + norm_bias).to(x.dtype)
    q, k, v = (normed @ w.T + b for w, b in zip(qkv_weight.split(width), qkv_bias.split(width), strict=True))
    packed = torch.stack([t.reshape(batch, tokens, heads, -1) for t in (q, k, v)], dim=2)
    branch = plain_attention(packed) @ proj_weight.T + proj_bias
    return x + (branch if layer_scale is None else branch * layer_scale)


def block_inputs(batch: int, tokens: int, width: int) -> dict[str, Tensor]:
    return {
        "x": torch.randn(batch, tokens, width),
        "norm_weight": 1 + 0.2 * torch.randn(width),
        "norm_bias": 0.1 * torch.randn(width),
        "qkv_weight": 1.5 * torch.randn(3 * width, width) / width**0.5,
        "qkv_bias": 0.1 * torch.randn(3 * width),
        "proj_weight": torch.randn(width, width) / width**0.5,
        "proj_bias": 0.1 * torch.randn(width),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 128), (3, 5, 160), (1, 257, 160), (2, 33, 26)])
@pytest.mark.parametrize("scaled", [False, True])
def test_block_matches_independent_formulation(
    shape: tuple[int, int, int], scaled: bool, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = block_inputs(*shape)
    if scaled:
        inputs["layer_scale"] = 0.1 + 0.05 * torch.randn(shape[-1])
    assert_accurate(partial(attention_block, **BLOCK), plain_block, inputs, dtype, device)


def test_block_with_non_contiguous_input(device: torch.device) -> None:
    inputs = block_inputs(3, 5, 32)
    inputs["x"] = torch.randn(5, 3, 32).transpose(0, 1)
    inputs["qkv_weight"] = inputs["qkv_weight"].T.contiguous().T
    assert_accurate(partial(attention_block, **BLOCK), plain_block, inputs, torch.float32, device)


def test_drop_path_keeps_or_drops_whole_samples(implementation: str, device: torch.device) -> None:
    # interpreted, 8000 programs would take a minute; chance is not the kernels' matter
    batch = 4000 if implementation == "reference" or device.type == "cuda" else 100
    inputs = {name: tensor.to(device) for name, tensor in block_inputs(batch, 2, 8).items()}
    x = inputs["x"]
    branch = attention_block(**inputs, **BLOCK) - x
    dropped = attention_block(**inputs, **BLOCK, drop_path=0.2) - x
    kept = dropped.flatten(1).abs().amax(dim=1) > 0  # [B]
    assert torch.allclose(dropped[kept], branch[kept] / 0.8, atol=1e-5)
    assert kept.float().mean().item() == pytest.approx(0.8, abs=2 / batch**0.5)  # 5 standard deviations


def test_dropout_acts_on_the_projected_output(implementation: str, device: torch.device) -> None:
    batch = 500 if implementation == "reference" or device.type == "cuda" else 50
    inputs = {name: tensor.to(device) for name, tensor in block_inputs(batch, 5, 8).items()}
    x = inputs["x"]
    branch = attention_block(**inputs, **BLOCK) - x
    out = attention_block(**inputs, **BLOCK, dropout=0.4) - x
    kept = out != 0
    assert torch.allclose(out[kept], branch[kept] / 0.6, atol=1e-5)
    assert kept.float().mean().item() == pytest.approx(0.6, abs=5 * (0.24 / out.numel()) ** 0.5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 8)}, ValueError, r"x must have shape \[B, N, D\]"),
        ({"heads": 3}, ValueError, "heads must divide the width 8"),
        ({"heads": 0}, ValueError, "heads must divide the width 8"),
        ({"norm_weight": torch.ones(1)}, ValueError, "norm_weight must have shape"),
        ({"norm_bias": torch.ones(9)}, ValueError, "norm_bias must have shape"),
        ({"qkv_weight": torch.zeros(8, 24)}, ValueError, r"qkv_weight must have shape \[24, 8\]"),
        ({"qkv_bias": torch.zeros(8)}, ValueError, "qkv_bias must have shape"),
        ({"proj_weight": torch.zeros(8, 8, dtype=torch.bfloat16)}, TypeError, "proj_weight must be torch.float32"),
        ({"proj_bias": torch.zeros(1)}, ValueError, "proj_bias must have shape"),
        ({"layer_scale": torch.zeros(1)}, ValueError, "layer_scale must have shape"),
        ({"dropout": -0.1}, ValueError, "dropout must be at least 0"),
        ({"drop_path": 1.0}, ValueError, "drop_path must be at least 0 and below 1"),
    ],
)
def test_block_errors_name_the_argument(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention_block(**(block_inputs(2, 3, 8) | BLOCK | change))
