import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_accurate
from torch import Tensor

from fastvit_kernels import attention, dispatch
from fastvit_kernels.attention import op

pytestmark = pytest.mark.usefixtures("implementation")

HEAD_DIMS = (32, 64, 72, 80, 88, 96, 104, 128)


def plain_attention(qkv: Tensor) -> Tensor:
    head_dim = qkv.shape[-1]
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # [B, N, H, d]
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / head_dim**0.5
    exponents = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    probabilities = exponents / exponents.sum(dim=-1, keepdim=True)
    return torch.einsum("bhnm,bmhd->bnhd", probabilities, v).reshape(*qkv.shape[:2], -1)


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
    tiling = tiling_of(80, dtype, 257, dispatch.Gpu(arch, 132))
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
