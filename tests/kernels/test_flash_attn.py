"""Scale, causal mask and log-sum-exp of attention, and the functions with flash-attn's names."""

from functools import partial

import pytest
import torch
from torch import Tensor

from fastvit_kernels import attention, attention_qkv
from fastvit_kernels.attention import launch
from fastvit_kernels.flash_attn import flash_attn_func, flash_attn_qkvpacked_func
from tests.in_full import in_full
from tests.kernels.numerics import assert_accurate

pytestmark = pytest.mark.usefixtures("implementation")


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float = 0.0, causal: bool = True, bias: Tensor | None = None):
    """[B, N, H, d] and lse; query i of N sees key j of M if M - j > N - 1 - i, counted from the ends."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * (scale or q.shape[-1] ** -0.5)
    scores = scores if bias is None else scores + bias
    if causal:
        from_end = torch.arange(q.shape[1] - 1, -1, -1)[:, None] > torch.arange(k.shape[1] - 1, -1, -1)
        scores = scores.masked_fill(from_end.to(q.device), -torch.inf)
    lse = scores.logsumexp(dim=-1)
    seen = (scores - lse[..., None]).exp().nan_to_num()
    return torch.einsum("bhnm,bmhd->bnhd", seen, v), lse.masked_fill(lse == -torch.inf, torch.inf)


def inputs(queries: int, keys: int, heads: int = 2, head_dim: int = 16, batch: int = 2) -> dict[str, Tensor]:
    shapes = {"q": queries, "k": keys, "v": keys}
    return {name: torch.randn(batch, tokens, heads, head_dim) for name, tokens in shapes.items()}


@pytest.mark.parametrize(
    ("queries", "keys", "head_dim", "dtype"),
    [
        (77, 77, 64, torch.float32),  # the text tower of CLIP
        (5, 40, 80, torch.bfloat16),
        (40, 5, 16, torch.float32),  # the first 35 queries see nothing
        (1, 33, 16, torch.float16),
        in_full(257, 257, 80, torch.bfloat16),
        in_full(33, 130, 72, torch.float32),
        in_full(130, 33, 24, torch.float32),
    ],
)
def test_causal(queries: int, keys: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    ours = lambda **tensors: flash_attn_func(**tensors, causal=True)  # noqa: E731
    arguments = inputs(queries, keys, heads=1 if queries == 77 else 2, head_dim=head_dim, batch=1)
    assert_accurate(ours, lambda **tensors: plain(**tensors)[0], arguments, dtype, device)


@pytest.mark.parametrize("causal", [False, True])
def test_scale_and_bias(causal: bool, device: torch.device) -> None:
    arguments = inputs(20, 35) | {"bias": torch.randn(2, 20, 35)}
    ours = partial(attention_qkv, scale=0.1, causal=causal)
    theirs = lambda **tensors: plain(**tensors, scale=0.1, causal=causal)[0].flatten(2)  # noqa: E731
    assert_accurate(ours, theirs, arguments, torch.float32, device)


@pytest.mark.parametrize(("queries", "keys", "causal"), [(35, 35, True), (20, 35, False), (20, 5, True)])
def test_log_sum_exp(queries: int, keys: int, causal: bool, device: torch.device) -> None:
    tensors = {name: tensor.to(device).requires_grad_() for name, tensor in inputs(queries, keys).items()}
    out, lse, probabilities = flash_attn_func(**tensors, softmax_scale=0.3, causal=causal, return_attn_probs=True)
    expected_out, expected = plain(**tensors, scale=0.3, causal=causal)
    torch.testing.assert_close(lse, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, expected_out, atol=1e-5, rtol=1e-5)
    assert not lse.requires_grad and lse.dtype == torch.float32 and probabilities.numel() == 0
    assert torch.equal(out, flash_attn_func(**tensors, softmax_scale=0.3, causal=causal))


def test_packed_is_the_same_as_separate(device: torch.device) -> None:
    qkv = torch.randn(2, 35, 3, 2, 16, device=device, requires_grad=True)
    packed = flash_attn_qkvpacked_func(qkv, causal=True, softmax_scale=0.2, return_attn_probs=True)
    separate = flash_attn_func(*qkv.unbind(2), causal=True, softmax_scale=0.2, return_attn_probs=True)
    assert packed[0].shape == (2, 35, 2, 16) and packed[1].shape == (2, 2, 35)
    for ours, theirs in zip(packed, separate, strict=True):
        torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(result[0].square().sum(), qkv)[0] for result in (packed, separate)]
    torch.testing.assert_close(*gradients)


def test_causal_sequences_of_different_lengths(device: torch.device) -> None:
    ends = torch.tensor([0, 7, 7, 27], dtype=torch.int32, device=device)
    qkv = torch.randn(30, 3, 2, 16, device=device)
    out, lse = attention(qkv, causal=True, cu_seqlens=ends, max_seqlen=20, return_lse=True)
    for first, last in ((0, 7), (7, 27)):
        own = attention(qkv[None, first:last], causal=True, return_lse=True)
        torch.testing.assert_close(out[first:last], own[0][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[:, first:last], own[1][0], atol=1e-5, rtol=1e-5)
    assert (out[27:] == 0).all() and lse[:, 27:].isposinf().all()


def test_what_comes_later_changes_no_bit(device: torch.device) -> None:
    qkv = torch.randn(1, 50, 3, 1, 16, device=device)
    before = attention(qkv, causal=True)
    qkv[:, 30:] = 100
    assert torch.equal(attention(qkv, causal=True)[:, :30], before[:, :30])


def test_dropout_with_a_causal_mask(device: torch.device) -> None:
    """Of equal values, what is kept is a share of the visible keys, and its expectation is the value."""
    qkv = torch.zeros(4, 64, 3, 2, 16, device=device)
    qkv[:, :, 2] = 1
    out = attention(qkv, causal=True, dropout=0.5)
    assert set((out[:, 0].unique() * 1.0).tolist()) <= {0.0, 2.0}
    assert abs(out[:, 32:].mean().item() - 1) < 0.1


def test_operators_take_the_new_arguments(implementation: str, device: torch.device) -> None:
    if implementation == "reference":
        pytest.skip("does not apply: a promise of the kernels alone")
    qkv = torch.randn(1, 5, 3, 1, 16, device=device, requires_grad=True)
    call = launch.Call(qkv, scale=0.1, causal=True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(launch.attention_op, tuple(call), test_utils=checks)
    out, lse = (tensor.detach() for tensor in launch.attention_op(*call))
    detached = call._replace(q=qkv.detach())
    torch.library.opcheck(launch.attention_backward_op, (out, out, lse, False, *detached), test_utils=checks[:2])


def test_libraries_are_not_asked_for_what_they_are_not_told() -> None:
    """They compute softmax(q k^T / sqrt(d)) v."""
    q = torch.empty(1, 5, 2, 16)
    assert launch.Call(q, q, q).plain and launch.Call(q, q, q, scale=0.25).plain
    assert not launch.Call(q, q, q, scale=0.1).plain and not launch.Call(q, q, q, causal=True).plain


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"window_size": (128, 0)}, r"window_size must be \(-1, -1\), got \(128, 0\)"),
        ({"softcap": 30.0}, "softcap must be 0, got 30.0"),
        ({"alibi_slopes": torch.ones(2)}, "alibi_slopes must be None"),
        ({"deterministic": True}, "deterministic must be False"),
        ({"return_attn_probs": True, "dropout_p": 0.1}, "return_attn_probs with dropout"),
    ],
)
def test_what_is_not_supported_is_refused(change: dict[str, object], said: str, device: torch.device) -> None:
    qkv = torch.randn(1, 5, 3, 2, 16, device=device)
    with pytest.raises(NotImplementedError, match=said):
        flash_attn_qkvpacked_func(qkv, **change)
    with pytest.raises(NotImplementedError, match=said):
        flash_attn_func(*qkv.unbind(2), **change)
