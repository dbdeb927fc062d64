from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_accurate
from torch import Tensor

from fastvit_kernels import attention, attention_block, dispatch
from fastvit_kernels.attention import op

pytestmark = pytest.mark.usefixtures("implementation")

HEAD_DIMS = (32, 64, 72, 80, 88, 96, 104, 128)
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


def random_qkv(batch: int, tokens: int, heads: int, head_dim: int) -> Tensor:
    return 1.5 * torch.randn(batch, tokens, 3, heads, head_dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head_dim"),
    [(1, 1, 1, 64), (3, 5, 2, 80), (1, 197, 2, 64), (1, 257, 2, 80), (2, 65, 1, 80), (1, 129, 1, 72), (2, 33, 3, 13)],
)
def test_matches_independent_formulation(
    batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    assert_accurate(attention, plain_attention, {"qkv": random_qkv(batch, tokens, heads, head_dim)}, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dimensions(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    assert_accurate(attention, plain_attention, {"qkv": random_qkv(2, 21, 2, head_dim)}, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("tokens", [196, 197, 256, 257, 577, 730, 1025])
def test_production_sizes(tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("too slow without a GPU")
    assert_accurate(attention, plain_attention, {"qkv": random_qkv(3, tokens, 16, head_dim)}, dtype, device)


@pytest.mark.gpu
def test_more_than_2_to_the_31_numbers(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("too large without a GPU")
    qkv = torch.randn(2600, 257, 3, 16, 80, device=device, dtype=torch.bfloat16)
    whole = attention(qkv)
    assert torch.equal(whole[-2:], attention(qkv[-2:].clone()))


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 140),
    heads=st.integers(1, 2),
    head_dim=st.integers(1, 128),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape(
    batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    assert_accurate(attention, plain_attention, {"qkv": random_qkv(batch, tokens, heads, head_dim)}, dtype, device)


@pytest.mark.parametrize("tokens", [17, 65])
def test_large_scores_do_not_overflow(tokens: int, device: torch.device) -> None:
    qkv = 8 * torch.randn(2, tokens, 3, 2, 64)  # scores of several hundred: their exponentials are infinite in float32
    assert_accurate(attention, plain_attention, {"qkv": qkv}, torch.float32, device, condition=100)


@pytest.mark.parametrize("hostile", ["one huge", "equal tokens", "offset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hostile_inputs(hostile: str, dtype: torch.dtype, device: torch.device) -> None:
    qkv = random_qkv(2, 37, 2, 40)
    if hostile == "one huge":
        qkv[0, 3, 2, 1, 5] = 1e4
    elif hostile == "equal tokens":
        qkv = qkv[:, :1].expand_as(qkv)
    else:
        qkv[:, :, :2] += 5  # every score gains 25 * 40 / sqrt(40) and more, which cancels
    assert_accurate(attention, plain_attention, {"qkv": qkv}, dtype, device, condition=100)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2", "ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("strongly", [-1.0, 1.0])
def test_scores_far_from_zero(strongly: float, device: torch.device) -> None:
    """What lies beyond the tokens scores 0. It must not count, neither against scores of -2000 nor of 2000."""
    qkv = torch.ones(1, 5, 3, 1, 64) + 0.01 * torch.randn(1, 5, 3, 1, 64)
    qkv[:, :, 0] *= 16
    qkv[:, :, 1] *= 16 * strongly
    assert_accurate(attention, plain_attention, {"qkv": qkv}, torch.float32, device, condition=2000)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_nan_stays_in_its_head(part: int, device: torch.device) -> None:
    qkv = random_qkv(2, 21, 2, 16).to(device)
    qkv[1, 20, part, 0, 3] = torch.nan
    spoilt = attention(qkv).view(2, 21, 2, 16).isnan()
    assert not spoilt[0].any() and not spoilt[1, :, 1].any()
    if part == 0:  # a query spoils its own row
        assert spoilt[1, 20, 0].all() and not spoilt[1, :20, 0].any()
    elif part == 1:  # a key, every row
        assert spoilt[1, :, 0].all()
    else:  # a value, one column of every row
        assert spoilt[1, :, 0, 3].all() and spoilt[1, :, 0].sum() == 21


@pytest.mark.parametrize("layout", ["parts apart", "heads before tokens", "tokens apart", "numbers apart", "repeated"])
def test_non_contiguous_input(layout: str, device: torch.device) -> None:
    wide = torch.randn(3, 2, 7, 2, 32)  # [3, B, N, H, 2 * d]
    qkv = {
        "parts apart": wide[..., :16].contiguous().permute(1, 2, 0, 3, 4),
        "heads before tokens": wide[..., :16].transpose(2, 3).contiguous().permute(1, 3, 0, 2, 4),
        "tokens apart": wide.view(3, 2, 7, 64)[..., 3:35].unflatten(-1, (2, 16)).permute(1, 2, 0, 3, 4),
        "numbers apart": wide[..., ::2].permute(1, 2, 0, 3, 4),
        "repeated": wide[:, :1, :, :, :16].permute(1, 2, 0, 3, 4).expand(2, 7, 3, 2, 16),
    }[layout]
    assert not qkv.is_contiguous()
    assert_accurate(attention, plain_attention, {"qkv": qkv}, torch.float32, device)


@pytest.mark.parametrize("layout", ["transposed", "repeated"])
def test_non_contiguous_gradient(layout: str, device: torch.device) -> None:
    qkv = random_qkv(3, 5, 2, 16).to(device).requires_grad_()
    gradient = torch.randn(5, 3, 32, device=device).transpose(0, 1)
    gradient = gradient if layout == "transposed" else gradient[:1, :1, :1].expand(3, 5, 32)
    ours = torch.autograd.grad(attention(qkv), qkv, gradient)[0]
    expected = torch.autograd.grad(plain_attention(qkv), qkv, gradient)[0]
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 16), (2, 0, 3, 2, 16), (2, 5, 3, 0, 16)])
def test_empty_input(shape: tuple[int, ...], device: torch.device) -> None:
    qkv = torch.zeros(shape, device=device, requires_grad=True)
    out = attention(qkv)
    out.sum().backward()
    assert out.shape == (shape[0], shape[1], shape[3] * 16)
    assert qkv.grad.shape == shape


@pytest.mark.parametrize("shape", [(2, 65, 2, 80), pytest.param((64, 257, 16, 80), marks=pytest.mark.gpu)])
def test_gradients_are_the_same_bits_in_every_run(shape: tuple[int, ...], device: torch.device) -> None:
    if device.type == "cpu" and shape[0] > 2:
        pytest.skip("too slow without a GPU")
    qkv = random_qkv(*shape).to(device, torch.bfloat16).requires_grad_()
    cotangent = torch.randn(*shape[:2], shape[2] * shape[3], device=device).bfloat16()
    first, second = (torch.autograd.grad(attention(qkv), qkv, cotangent)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_dropout_removes_and_rescales_probabilities(implementation: str, device: torch.device) -> None:
    qkv = torch.ones(20_000, 1, 3, 1, 8, device=device)  # one token: its only probability, 1, is kept or dropped
    if implementation == "triton":
        with pytest.raises(RuntimeError, match="the attention kernels have no dropout"):
            attention(qkv, dropout=0.25)
    with dispatch.using("auto"):
        out = attention(qkv, dropout=0.25)[:, 0, 0]
    assert set(out.unique().tolist()) <= {0.0, torch.tensor(1 / 0.75).item()}
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.015)  # 5 standard deviations


def test_large_heads_run_the_reference(implementation: str, device: torch.device) -> None:
    qkv = random_qkv(2, 5, 1, 136).to(device)
    if implementation == "triton":
        with pytest.raises(RuntimeError, match="head dimensions up to 128, not 136"):
            attention(qkv)
    with dispatch.using("auto"):
        torch.testing.assert_close(attention(qkv), plain_attention(qkv))


def test_float64_is_for_the_reference(implementation: str, device: torch.device) -> None:
    qkv = random_qkv(2, 5, 1, 16).double().to(device)
    if implementation == "triton":
        with pytest.raises(RuntimeError, match=r"the kernels take .* not torch.float64"):
            attention(qkv)
    with dispatch.using("auto"):
        torch.testing.assert_close(attention(qkv), plain_attention(qkv), rtol=1e-12, atol=1e-12)


def test_compiles_without_graph_break(device: torch.device) -> None:
    compiled = torch.compile(lambda qkv: attention(qkv).sin(), fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, tokens in ((2, 5), (3, 18)):
        qkv = random_qkv(batch, tokens, 2, 16).to(device).requires_grad_()
        result, expected = compiled(qkv), attention(qkv).sin()
        assert torch.equal(result, expected)
        gradient, expected_gradient = (torch.autograd.grad(y.sum(), qkv)[0] for y in (result, expected))
        assert torch.equal(gradient, expected_gradient)


def test_registered_operator(implementation: str, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("the operator is the Triton side")
    qkv = random_qkv(2, 5, 2, 16).to(device)
    torch.library.opcheck(op.attention_op, (qkv.clone().requires_grad_(),))
    torch.library.opcheck(op.attention_op, (qkv.transpose(0, 1),))


def test_second_derivative_is_refused(implementation: str, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("a matter of scaled_dot_product_attention")
    qkv = random_qkv(2, 5, 1, 16).to(device).requires_grad_()
    gradient = torch.autograd.grad(attention(qkv).sin().sum(), qkv, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="attention has no second derivative"):
        gradient.sum().backward()


def test_pieces_of_a_head_are_powers_of_two_with_little_padding() -> None:
    known = {80: (64, 16), 72: (64, 16), 88: (64, 32), 104: (64, 32, 16), 96: (64, 32), 128: (128,), 5: (16,)}
    assert {head_dim: op.pieces(head_dim) for head_dim in known} == known
    for head_dim in range(1, op.MAX_HEAD_DIM + 1):
        assert head_dim <= sum(op.pieces(head_dim)) < head_dim + 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("tiling_of", [op.forward_tiling, op.backward_query_tiling, op.backward_key_tiling])
def test_blocks_cover_all_tokens(tiling_of: object, arch: str, dtype: torch.dtype) -> None:
    tiling = tiling_of(80, dtype, arch)
    assert tiling.row_tails(257) == (1,)
    for tokens in range(1, 700):
        *whole_tails, last = *tiling.row_tails(tokens), 0
        covered = tokens // tiling.rows * tiling.rows + sum(whole_tails)
        assert last == 0 and tokens <= covered < tokens + 64
        assert tiling.blocks(tokens) == tokens // tiling.rows + len(whole_tails)
        tail = tiling.options(tokens)["TAIL_N"]
        columns = tokens // tiling.columns * tiling.columns + tail
        assert tokens <= columns < tokens + max(16, tail / 2)
        assert tail in (0, 16, 32, 64) and tail <= tiling.columns


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
    ("qkv", "dropout", "error", "message"),
    [
        (torch.zeros(1, 2, 3, 8), 0.0, ValueError, r"qkv must have shape \[B, N, 3, H, d\], got \[1, 2, 3, 8\]"),
        (torch.zeros(1, 2, 2, 1, 8), 0.0, ValueError, "qkv must have shape"),
        (torch.zeros(1, 2, 3, 1, 8, dtype=torch.int32), 0.0, TypeError, "qkv must be floating point"),
        (torch.zeros(1, 2, 3, 1, 8), 1.0, ValueError, "dropout must be at least 0 and below 1"),
    ],
)
def test_errors_name_the_argument(qkv: Tensor, dropout: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention(qkv, dropout=dropout)


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
