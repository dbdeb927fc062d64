from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastvit_kernels import attention, attention_qkv, dispatch
from fastvit_kernels.attention import launch, tiling
from fastvit_kernels.column_sums import ColumnSums
from tests.in_full import IN_FULL, in_full
from tests.kernels.numerics import assert_accurate

pytestmark = pytest.mark.usefixtures("implementation")


def plain_attention(qkv: Tensor) -> Tensor:
    return plain_attention_qkv(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])


def plain_attention_qkv(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, kept: Tensor | None = None
) -> Tensor:
    """With `kept`, what probabilities [B, H, N, M] are multiplied by."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias
    exponents = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    probabilities = exponents / exponents.sum(dim=-1, keepdim=True)
    if kept is not None:
        probabilities = probabilities * kept
    return torch.einsum("bhnm,bmhd->bnhd", probabilities, v).reshape(*q.shape[:2], -1)


def random_qkv(batch: int, tokens: int, heads: int, head_dim: int) -> Tensor:
    return 1.5 * torch.randn(batch, tokens, 3, heads, head_dim)


@pytest.mark.parametrize("dtype", [in_full(torch.float32), torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head_dim"),
    [
        (1, 1, 1, 64),
        in_full(3, 5, 2, 80),
        in_full(1, 197, 2, 64),
        (1, 257, 1, 80),  # a tail of one row, and streamed blocks with and without a mask
        in_full(2, 65, 1, 80),
        in_full(1, 129, 1, 72),
        (2, 33, 3, 13),
    ],
)
def test_matches_independent_formulation(
    batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    assert_accurate(attention, plain_attention, {"qkv": random_qkv(batch, tokens, heads, head_dim)}, dtype, device)


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        (80, torch.float32),
        (72, torch.float16),
        (104, torch.bfloat16),
        *(
            in_full(head_dim, dtype)
            for head_dim in (32, 64, 72, 80, 88, 96, 104, 128)
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        ),
    ],
)
def test_head_dimensions(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    assert_accurate(attention, plain_attention, {"qkv": random_qkv(2, 21, 2, head_dim)}, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "head_dim", "dtype"),
    [
        *((257, 80, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        *((tokens, head_dim, torch.bfloat16) for tokens, head_dim in (
            (196, 32), (197, 64), (256, 72), (577, 80), (257, 88), (730, 96), (257, 104), (1025, 128)
        )),
    ],
)  # fmt: skip
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


@settings(
    max_examples=10 if IN_FULL else 3,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
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


@pytest.mark.parametrize("tokens", [17, in_full(65)])
def test_large_scores_do_not_overflow(tokens: int, device: torch.device) -> None:
    qkv = 8 * torch.randn(2, tokens, 3, 2, 64)  # scores of several hundred: their exponentials are infinite in float32
    assert_accurate(attention, plain_attention, {"qkv": qkv}, torch.float32, device, condition=100)


@pytest.mark.parametrize("hostile", ["one huge", "equal tokens", "offset"])
@pytest.mark.parametrize("dtype", [torch.float32, in_full(torch.bfloat16)])
def test_hostile_inputs(hostile: str, dtype: torch.dtype, device: torch.device) -> None:
    qkv = random_qkv(1, 37, 2, 40)
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


@pytest.mark.parametrize("shape", [(2, 37, 1, 80), pytest.param((64, 257, 16, 80), marks=pytest.mark.gpu)])
def test_gradients_are_the_same_bits_in_every_run(shape: tuple[int, ...], device: torch.device) -> None:
    if device.type == "cpu" and shape[0] > 2:
        pytest.skip("too slow without a GPU")
    qkv = random_qkv(*shape).to(device, torch.bfloat16).requires_grad_()
    cotangent = torch.randn(*shape[:2], shape[2] * shape[3], device=device).bfloat16()
    first, second = (torch.autograd.grad(attention(qkv), qkv, cotangent)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("tokens", "head_dim", "dtype", "causal"),
    [
        (37, 24, torch.float32, False),
        (33, 16, torch.float32, True),
        in_full(33, 16, torch.float32, False),
        in_full(129, 16, torch.bfloat16, False),
        in_full(133, 80, torch.bfloat16, True),
    ],
)
def test_sums_over_tokens(
    tokens: int, head_dim: int, dtype: torch.dtype, causal: bool, implementation: str, device: torch.device
) -> None:
    """They are the gradient of a bias of qkv, and change no bit of the gradient of qkv."""
    if implementation == "reference":
        pytest.skip("does not apply: a promise of the kernels alone")
    qkv = random_qkv(2, tokens, 2, head_dim).to(device, dtype)
    out, lse = launch.launch_forward(*launch.Call(qkv, causal=causal))
    saved = torch.randn_like(out), qkv, out, lse
    gradient = launch.launch_backward(*saved, causal)
    runs = []
    for _ in range(2):
        column_sum, sums = torch.full([qkv[0, 0].numel()], torch.nan, device=device), ColumnSums()
        assert torch.equal(launch.launch_backward_and_sums(*saved, column_sum, sums, causal), gradient)
        sums.launch()
        runs.append(column_sum)
    assert torch.equal(*runs)
    bias = torch.zeros(3, 2, head_dim, dtype=torch.float64, device=device, requires_grad=True)
    unseen = torch.full((tokens, tokens), -torch.inf, dtype=torch.float64, device=device).triu(1) if causal else None
    y = plain_attention_qkv(*(qkv.double() + bias).unbind(2), bias=unseen)
    (exact,) = torch.autograd.grad(y, bias, saved[0].double())
    largest = gradient.double().abs().sum((0, 1)).max()
    error = (runs[0] - exact.flatten()).abs().max() / largest
    assert error < 8 * torch.finfo(dtype).eps  # scores of about 10 are rounded too


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


@pytest.mark.parametrize("with_options", [in_full(False), True])
def test_compiles_without_graph_break(with_options: bool, device: torch.device) -> None:
    def function(qkv: Tensor, bias: Tensor) -> Tensor:
        return (attention(qkv, bias=bias, dropout=0.0) if with_options else attention(qkv)).sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, tokens in ((2, 5), (3, 18)):
        qkv = random_qkv(batch, tokens, 1, 16).to(device).requires_grad_()
        bias = torch.randn(1, tokens, tokens, device=device, requires_grad=True)
        inputs = (qkv, bias) if with_options else (qkv,)
        result, expected = compiled(qkv, bias), function(qkv, bias)
        assert torch.equal(result, expected)
        gradients, expected_gradients = (torch.autograd.grad(y.sum(), inputs) for y in (result, expected))
        assert all(map(torch.equal, gradients, expected_gradients))


def test_dropout_and_lengths_compile_without_graph_break(implementation: str, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: the reference must know the lengths of the sequences")

    def function(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        return attention(qkv, dropout=0.5, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen).sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for ends in ([0, 5, 9], [0, 18, 18, 20]):
        qkv = random_qkv(1, ends[-1], 2, 16)[0].to(device).requires_grad_()
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
        torch.manual_seed(3)
        result = compiled(qkv, cu_seqlens, ends[1])
        torch.manual_seed(3)
        expected = function(qkv, cu_seqlens, ends[1])
        assert torch.equal(result, expected)
        gradient, expected_gradient = (torch.autograd.grad(y.sum(), qkv)[0] for y in (result, expected))
        assert torch.equal(gradient, expected_gradient)


def test_registered_operator(implementation: str, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: the operator is Triton's")
    qkv = random_qkv(1, 5, 2, 16).to(device)
    nothing_else = (None, None, None, None, 0.0, None, None, None, None)
    torch.library.opcheck(launch.attention_op, (qkv.clone().requires_grad_(), *nothing_else))
    torch.library.opcheck(launch.attention_op, (qkv.transpose(0, 1), *nothing_else))
    q, k, v = (x.clone().requires_grad_() for x in qkv.unbind(2))
    bias = torch.randn(1, 2, 5, 5, device=device, requires_grad=True)
    seed = torch.tensor([7], device=device)
    torch.library.opcheck(launch.attention_op, (q, k, v, bias, seed, 0.5, None, None, None, None))
    packed = qkv.flatten(0, 1).requires_grad_()
    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32, device=device)
    torch.library.opcheck(launch.attention_op, (packed, None, None, None, None, 0.0, cu_seqlens, cu_seqlens, 3, 3))


def test_second_derivative_is_refused(implementation: str, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: scaled_dot_product_attention decides")
    qkv = random_qkv(2, 5, 1, 16).to(device).requires_grad_()
    gradient = torch.autograd.grad(attention(qkv).sin().sum(), qkv, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="attention has no second derivative"):
        gradient.sum().backward()


def test_pieces_of_a_head_are_powers_of_two_with_little_padding() -> None:
    known = {80: (64, 16), 72: (64, 16), 88: (64, 32), 104: (64, 32, 16), 96: (64, 32), 128: (128,), 5: (16,)}
    assert {head_dim: tiling.pieces(head_dim) for head_dim in known} == known
    for head_dim in range(1, tiling.MAX_HEAD_DIM + 1):
        assert head_dim <= sum(tiling.pieces(head_dim)) < head_dim + 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", [in_full("sm_80"), "sm_90", in_full("gfx942")])
@pytest.mark.parametrize("tiling_of", [tiling.forward_tiling, tiling.backward_query_tiling, tiling.backward_key_tiling])
def test_blocks_cover_all_tokens(tiling_of: object, arch: str, dtype: torch.dtype) -> None:
    cut = tiling_of(80, dtype, 257, dispatch.Gpu(arch, 132))
    assert cut.row_tails(257) == (1,)
    for tokens in range(1, 700) if IN_FULL else (1, 15, 63, 64, 65, 127, 128, 129, 196, 197, 257, 577):
        *whole_tails, last = *cut.row_tails(tokens), 0
        covered = tokens // cut.rows * cut.rows + sum(whole_tails)
        assert last == 0 and tokens <= covered < tokens + 64
        blocks, options = tiling.launch_options(cut, tokens, tokens, 80, causal=False)
        assert blocks == tokens // cut.rows + len(whole_tails)
        tail = options["TAIL_N"]
        columns = tokens // cut.columns * cut.columns + tail
        assert tokens <= columns < tokens + max(16, tail / 2)
        assert tail in (0, 16, 32, 64) and tail <= cut.columns


# Separate q, k and v


def random_q_k_v(batch: int, queries: int, keys: int, heads: int, head_dim: int) -> dict[str, Tensor]:
    tokens = {"q": queries, "k": keys, "v": keys}
    return {name: 1.5 * torch.randn(batch, count, heads, head_dim) for name, count in tokens.items()}


@pytest.mark.parametrize("dtype", [in_full(torch.float32), torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "head_dim"),
    [in_full(2, 21, 21, 2, 72), (2, 1, 33, 2, 80), in_full(1, 33, 2, 1, 64), (1, 5, 70, 2, 16), (1, 129, 18, 1, 40)],
)
def test_separate_inputs(
    batch: int, queries: int, keys: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = random_q_k_v(batch, queries, keys, heads, head_dim)
    assert_accurate(attention_qkv, plain_attention_qkv, inputs, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize(("queries", "keys"), [(1, 257), (257, 257), (197, 1025)])
def test_separate_inputs_of_production_size(queries: int, keys: int, head_dim: int, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("too slow without a GPU")
    inputs = random_q_k_v(3, queries, keys, 16, head_dim) | {"bias": torch.randn(1, 16, queries, keys)}
    assert_accurate(attention_qkv, plain_attention_qkv, inputs, torch.bfloat16, device)


def test_separate_inputs_in_any_layout(device: torch.device) -> None:
    wide = torch.randn(2, 7, 3, 2, 32)
    q = wide[:, :, 0]  # one of three
    k = torch.randn(2, 2, 7, 32).transpose(1, 2)  # heads before tokens
    v = torch.randn(2, 7, 100)[..., 3:67].unflatten(-1, (2, 32))  # tokens apart
    assert_accurate(attention_qkv, plain_attention_qkv, {"q": q, "k": k, "v": v}, torch.float32, device)


def test_gradients_of_separate_inputs_are_contiguous(implementation: str, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: scaled_dot_product_attention decides")
    q, k, v = (x.to(device).requires_grad_() for x in random_qkv(2, 5, 2, 16).unbind(2))
    assert all(x.is_contiguous() for x in torch.autograd.grad(attention_qkv(q, k, v).sum(), (q, k, v)))


@pytest.mark.parametrize(("queries", "keys"), [(3, 0), (0, 3)])
def test_without_keys_the_output_is_zero(queries: int, keys: int, device: torch.device) -> None:
    q, k, v = (x.to(device).requires_grad_() for x in random_q_k_v(2, queries, keys, 2, 16).values())
    out = attention_qkv(q, k, v)
    assert out.shape == (2, queries, 32) and not out.any()
    out.sum().backward()
    assert not q.grad.any() and not k.grad.any() and not v.grad.any()


# Bias


@pytest.mark.parametrize("dtype", [torch.float32, in_full(torch.bfloat16)])
@pytest.mark.parametrize(
    "shape", [in_full((2, 2, 35, 19)), (1, 2, 35, 19), in_full((2, 1, 35, 19)), in_full((35, 19)), (2, 1, 1, 19)]
)
def test_bias(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    inputs = random_q_k_v(2, 35, 19, 2, 24) | {"bias": 2 * torch.randn(shape)}
    assert_accurate(attention_qkv, plain_attention_qkv, inputs, dtype, device)


@pytest.mark.parametrize("tokens", [in_full(65), 33])
def test_bias_of_packed_inputs(tokens: int, device: torch.device) -> None:
    inputs = {"qkv": random_qkv(3, tokens, 2, 16), "bias": torch.randn(1, 2, tokens, tokens)}
    assert_accurate(
        attention, lambda qkv, bias: plain_attention_qkv(*qkv.unbind(2), bias), inputs, torch.float32, device
    )


def test_bias_in_float32_keeps_its_precision(device: torch.device) -> None:
    qkv = random_qkv(2, 17, 2, 16).bfloat16().to(device)
    bias = (300 + torch.randn(2, 17, 17, device=device)).requires_grad_()  # bfloat16 would make steps of 2
    out = attention(qkv, bias=bias)
    exact = plain_attention_qkv(*qkv.double().unbind(2), bias.double())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=0.02, atol=0.02)
    ours, expected = (torch.autograd.grad(y.sum(), bias)[0] for y in (out, exact))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.05)


def test_bias_in_any_layout(device: torch.device) -> None:
    bias = torch.randn(19, 35, 2, 2).permute(3, 2, 1, 0)[:1]
    inputs = random_q_k_v(2, 35, 19, 2, 16) | {"bias": bias}
    assert_accurate(attention_qkv, plain_attention_qkv, inputs, torch.float32, device)


def test_infinite_bias_is_a_mask(device: torch.device) -> None:
    """Keys with a bias of -inf might as well not be there; a query without keys gives 0, and gradients of 0."""
    q, k, v = (x.to(device).requires_grad_() for x in random_q_k_v(2, 35, 40, 2, 16).values())
    bias = torch.randn(1, 1, 35, 40, device=device)
    bias[..., :33] = -torch.inf  # the whole first block of keys
    bias[..., 20, :] = -torch.inf
    bias.requires_grad_()
    out = attention_qkv(q, k, v, bias=bias)
    seen = torch.arange(35, device=device) != 20
    expected = plain_attention_qkv(q[:, seen], k[:, 33:], v[:, 33:], bias[:, :, seen, 33:])
    assert not out[:, 20].any()
    torch.testing.assert_close(out[:, seen], expected)
    cotangent = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v, bias), cotangent)
    theirs = torch.autograd.grad(expected, (q, k, v, bias), cotangent[:, seen])
    for gradient, expected_gradient in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)
    assert not ours[0][:, 20].any() and not ours[3][..., 20, :].any()


def test_gradients_with_bias_are_the_same_bits_in_every_run(device: torch.device) -> None:
    qkv = random_qkv(3, 34, 2, 16).to(device, torch.bfloat16).requires_grad_()
    bias = torch.randn(34, 34, device=device, requires_grad=True)
    first, second = (torch.autograd.grad(attention(qkv, bias=bias).sin().sum(), (qkv, bias)) for _ in range(2))
    assert all(map(torch.equal, first, second))


# Sequences of different lengths


def plain_sequences(cu_seqlens_q: list[int], cu_seqlens_k: list[int]) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = [q.new_zeros(len(q), q.shape[1] * q.shape[2])[cu_seqlens_q[-1] :]]
        for (a, b), (c, d) in reversed(list(zip(pairwise(cu_seqlens_q), pairwise(cu_seqlens_k), strict=True))):
            if d > c:
                outs.insert(0, plain_attention_qkv(q[None, a:b], k[None, c:d], v[None, c:d])[0])
            else:
                outs.insert(0, q.new_zeros(b - a, q.shape[1] * q.shape[2]))
        return torch.cat(outs)

    return function


@pytest.mark.parametrize("dtype", [torch.float32, in_full(torch.bfloat16)])
@pytest.mark.parametrize(
    ("ends", "tokens", "max_seqlen"),
    [
        ([0, 5, 5, 38, 40, 40], 40, 33),
        in_full([0, 1, 66], 66, 200),
        ([0, 33, 40], 75, 33),  # more tokens than sequences need
        ([0, 70], 70, 3),  # not the longest
        in_full([0, 0], 3, 0),
        ([0], 3, 0),
    ],
)
def test_sequences(ends: list[int], tokens: int, max_seqlen: int, dtype: torch.dtype, device: torch.device) -> None:
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
    assert_accurate(
        lambda qkv: attention(qkv, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen),
        lambda qkv: plain_sequences(ends, ends)(*qkv.unbind(1)) + 0 * qkv.sum(),
        {"qkv": random_qkv(1, tokens, 2, 24)[0]},
        dtype,
        device,
    )


def test_sequences_of_separate_inputs(device: torch.device) -> None:
    ends_q, ends_k = [0, 3, 4, 40, 41], [0, 35, 39, 39, 41]  # the third has no keys
    cu_seqlens = [torch.tensor(ends, dtype=torch.int32, device=device) for ends in (ends_q, ends_k)]
    inputs = {name: x[0] for name, x in random_q_k_v(1, 50, 43, 2, 24).items()}
    assert_accurate(
        lambda q, k, v: attention_qkv(
            q, k, v, cu_seqlens_q=cu_seqlens[0], cu_seqlens_k=cu_seqlens[1], max_seqlen_q=36, max_seqlen_k=35
        ),
        plain_sequences(ends_q, ends_k),
        inputs,
        torch.float32,
        device,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 80])
def test_sequences_of_production_size(head_dim: int, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("too slow without a GPU")
    ends = torch.randint(1, 1025, (24,)).cumsum(0).tolist()
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32, device=device)
    assert_accurate(
        lambda qkv: attention(qkv, cu_seqlens=cu_seqlens, max_seqlen=1024),
        lambda qkv: plain_sequences([0, *ends], [0, *ends])(*qkv.unbind(1)),
        {"qkv": random_qkv(1, ends[-1] + 100, 16, head_dim)[0]},
        torch.bfloat16,
        device,
    )


# Dropout


def with_same_mask(function: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> Tensor:
    torch.manual_seed(5)
    return function(*inputs, **options)


def recovered_mask(q: Tensor, k: Tensor, dropout: float, bias: Tensor | None = None) -> Tensor:
    """What attention multiplies probabilities by, [B, H, N, M]: with an identity for v, the output is probabilities."""
    identity = torch.eye(k.shape[1], k.shape[3], device=k.device)[None, :, None].expand(k.shape).contiguous()
    dropped = with_same_mask(attention_qkv, q, k, identity, bias=bias, dropout=dropout)
    whole = attention_qkv(q, k, identity, bias=bias)
    ratio = (dropped / whole).unflatten(-1, k.shape[2:])[..., : k.shape[1]]
    return ratio.nan_to_num().permute(0, 2, 1, 3)


@pytest.mark.parametrize(("queries", "keys", "with_bias"), [in_full(65, 65, False), (37, 34, True), (1, 40, False)])
def test_dropout_is_the_same_mask_in_all_kernels(
    queries: int, keys: int, with_bias: bool, implementation: str, device: torch.device
) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: scaled_dot_product_attention decides")
    head_dim = max(40, -(-keys // 8) * 8)  # at least a channel per key, which the mask is recovered from
    q, k, v = (x.to(device).requires_grad_() for x in random_q_k_v(1, queries, keys, 2, head_dim).values())
    bias = torch.randn(2, queries, keys, device=device, requires_grad=True) if with_bias else None
    mask = recovered_mask(q, k, 0.3, bias).detach()
    torch.testing.assert_close(mask, torch.where(mask > 0.5, 1 / 0.7, 0.0), rtol=1e-4, atol=0)
    inputs = (q, k, v, bias) if with_bias else (q, k, v)
    ours = with_same_mask(attention_qkv, q, k, v, bias=bias, dropout=0.3)
    expected = plain_attention_qkv(q, k, v, bias, mask.sign() / 0.7)
    torch.testing.assert_close(ours, expected)
    cotangent = torch.randn_like(ours)
    for gradient, expected_gradient in zip(
        torch.autograd.grad(ours, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_dropout_mask_does_not_depend_on_the_blocks(
    implementation: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: scaled_dot_product_attention decides")
    q, k = (torch.zeros(1, 70, 2, 80, device=device) for _ in range(2))
    mask = recovered_mask(q, k, 0.5)
    monkeypatch.setattr(launch, "forward_tiling", lambda *_: tiling.Tiling(64, 16, num_warps=4, stages=1))
    assert torch.equal(recovered_mask(q, k, 0.5), mask)


def test_dropout_of_sequences_is_that_of_images(implementation: str, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: scaled_dot_product_attention decides")
    qkv = random_qkv(2, 37, 2, 16).to(device).requires_grad_()
    cu_seqlens = torch.tensor([0, 37, 74], dtype=torch.int32, device=device)
    images = with_same_mask(attention, qkv, dropout=0.4)
    packed = qkv.flatten(0, 1)
    sequences = with_same_mask(attention, packed, dropout=0.4, cu_seqlens=cu_seqlens, max_seqlen=37)
    torch.testing.assert_close(sequences, images.flatten(0, 1))
    gradients = [torch.autograd.grad(y.sin().sum(), qkv)[0] for y in (images, sequences)]
    torch.testing.assert_close(*gradients)


def test_dropout_rate_and_independence(implementation: str, device: torch.device) -> None:
    """Of 2 x 2 x 128 x 128 decisions, the share that keeps, and that agrees with a neighbour's, head's or image's."""
    if implementation == "reference":
        pytest.skip("does not apply: scaled_dot_product_attention decides")
    mask = recovered_mask(*torch.zeros(2, 2, 128, 2, 128, device=device), 0.25).sign()
    assert mask.mean().item() == pytest.approx(0.75, abs=0.0085)  # 5 standard deviations
    others = [mask.roll(shift, dim) for dim, shift in ((0, 1), (1, 1), (2, 1), (2, 8), (3, 1), (3, 8))]
    others += [mask.roll((8, 8), (2, 3)), mask.transpose(2, 3)]
    for other in others:
        assert (mask == other).float().mean().item() == pytest.approx(0.75**2 + 0.25**2, abs=0.015)


def test_dropout_removes_and_rescales_probabilities(implementation: str, device: torch.device) -> None:
    images = 12 if implementation == "triton" and device.type == "cpu" else 2000
    qkv = torch.ones(images, 1, 3, 1, 8, device=device)  # one token: its only probability, 1, is kept or dropped
    out = attention(qkv, dropout=0.25)[:, 0, 0]
    torch.testing.assert_close(out, torch.where(out > 0.5, 1 / 0.75, 0.0))
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / images) ** 0.5)
    assert not torch.equal(attention(qkv, dropout=0.25)[:, 0, 0], out)
    assert torch.equal(with_same_mask(attention, qkv, dropout=0.25), with_same_mask(attention, qkv, dropout=0.25))


def test_dropout_under_checkpointing(device: torch.device) -> None:
    qkv = random_qkv(2, 9, 2, 16).to(device).requires_grad_()
    plainly = with_same_mask(lambda: attention(qkv, dropout=0.5).sin())
    again = with_same_mask(lambda: checkpoint(lambda x: attention(x, dropout=0.5).sin(), qkv, use_reentrant=False))
    torch.rand(3)
    assert torch.equal(*(torch.autograd.grad(y.sum(), qkv)[0] for y in (plainly, again)))


# Errors

LENGTHS = torch.tensor([0, 2], dtype=torch.int32)
QKV = torch.zeros(1, 2, 3, 1, 8)
PACKED = torch.zeros(2, 3, 1, 8)


@pytest.mark.parametrize(
    ("qkv", "options", "error", "message"),
    [
        (torch.zeros(1, 2, 3, 8), {}, ValueError, r"qkv must have shape \[B, N, 3, H, d\], got \[1, 2, 3, 8\]"),
        (torch.zeros(1, 2, 2, 1, 8), {}, ValueError, "qkv must have shape"),
        (torch.zeros(1, 2, 3, 1, 8, dtype=torch.int32), {}, TypeError, "qkv must be floating point"),
        (QKV, {"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1"),
        (
            QKV,
            {"bias": torch.zeros(3, 2)},
            ValueError,
            r"bias must be broadcastable to .* = \[1, 1, 2, 2\], got \[3, 2\]",
        ),
        (QKV, {"bias": torch.zeros(1, 1, 1, 2, 2)}, ValueError, "bias must be broadcastable"),
        (QKV, {"bias": torch.zeros(2, 2, dtype=torch.bool)}, TypeError, "bias must be floating point"),
        (QKV, {"bias": torch.zeros(2, 2).half()}, TypeError, "bias must be torch.float32"),
        (QKV, {"bias": torch.zeros(2, 2, device="meta")}, ValueError, "bias must be on cpu, got meta"),
        (
            QKV,
            {"cu_seqlens": LENGTHS, "max_seqlen": 2},
            ValueError,
            r"qkv must have shape \[T, 3, H, d\] with cu_seqlens",
        ),
        (PACKED, {"cu_seqlens": LENGTHS}, ValueError, "cu_seqlens and max_seqlen must be given together"),
        (QKV, {"max_seqlen": 2}, ValueError, "cu_seqlens and max_seqlen must be given together"),
        (PACKED, {"cu_seqlens": LENGTHS.long(), "max_seqlen": 2}, TypeError, "cu_seqlens must be torch.int32"),
        (PACKED, {"cu_seqlens": LENGTHS[:0], "max_seqlen": 2}, ValueError, r"cu_seqlens must have shape \[S \+ 1\]"),
        (PACKED, {"cu_seqlens": LENGTHS.to("meta"), "max_seqlen": 2}, ValueError, "cu_seqlens must be on cpu"),
        (
            PACKED,
            {"cu_seqlens": LENGTHS, "max_seqlen": 2, "bias": torch.zeros(2, 2)},
            ValueError,
            "bias cannot be combined with cu_seqlens",
        ),
    ],
)
def test_errors_name_the_argument(qkv: Tensor, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention(qkv, **options)


X = torch.zeros(1, 2, 1, 8)
SEQUENCES = {"cu_seqlens_q": LENGTHS, "cu_seqlens_k": LENGTHS, "max_seqlen_q": 2, "max_seqlen_k": 2}


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        ((X[0], X, X), {}, ValueError, r"q must have shape \[B, N, H, d\], got \[2, 1, 8\]"),
        ((X, X, X), SEQUENCES, ValueError, r"q must have shape \[T, H, d\] with cu_seqlens_q"),
        ((X, X[0], X), {}, ValueError, "k must have shape"),
        ((X, X.expand(3, 2, 1, 8), X), {}, ValueError, r"k must have shape \[1, 2, 1, 8\], got \[3, 2, 1, 8\]"),
        ((X, X, X[:, :1]), {}, ValueError, r"v must have shape \[1, 2, 1, 8\], got \[1, 1, 1, 8\]"),
        ((X, X.half(), X), {}, TypeError, "k must be torch.float32"),
        ((X[0], X[0], X[0]), {**SEQUENCES, "cu_seqlens_k": None}, ValueError, "cu_seqlens_q and cu_seqlens_k must be"),
        ((X[0], X[0], X[0]), {**SEQUENCES, "max_seqlen_k": None}, ValueError, "cu_seqlens_k and max_seqlen_k must be"),
        (
            (X[0], X[0], X[0]),
            {**SEQUENCES, "cu_seqlens_k": LENGTHS[:1]},
            ValueError,
            "must have the same length, got 2 and 1",
        ),
    ],
)
def test_errors_of_separate_inputs(inputs: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention_qkv(*inputs, **options)
