"""Attention of libraries inside the operator. On the CPU, PyTorch's flash attention for the CPU takes their place."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels import FusedBlock, attention, attention_qkv, dispatch, table
from fastvit_kernels.attention import providers
from fastvit_kernels.attention.launch import attention_op, launch_forward
from fastvit_kernels.dispatch import Gpu
from fastvit_kernels.table import Entry, Provenance, Table

aten = torch.ops.aten
HERE = Gpu("interpreter", 2, "X90")
MEASURED = Provenance("X90", True, "measured in a test", "2026-01-01", "3.6", "2.11", table.TOOL)
interpreted = pytest.mark.skipif(not dispatch.INTERPRETED, reason="does not apply: needs Triton's interpreter")


class OnCpu:
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def obstacle(self, q: Tensor) -> str | None:
        return "takes head dimensions up to 64" if q.shape[-1] > 64 else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append("forward")
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append("backward")
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad_out, q, k, v, out, lse, 0.0, False)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[OnCpu]:
    """In the place of cuDNN; what is on the CPU counts as on a GPU, by name X90."""
    monkeypatch.setitem(providers.PROVIDERS, "cudnn", OnCpu())
    monkeypatch.setattr(dispatch, "is_on_gpu", lambda tensor: True)
    with dispatch.compiling_for(HERE):
        yield providers.PROVIDERS["cudnn"]


def by_table(*passes: str, dtype: str = "float32", tokens: int = 7) -> Table:
    where = {"head_dim": 16, "dtype": dtype, "tokens": tokens}
    return Table(
        MEASURED, tuple(Entry(name, where, {"provider": "cudnn"}, 2.0, 1.0, 0.01, "source") for name in passes)
    )


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2)


@interpreted
@pytest.mark.parametrize("passes", [("attention_fwd", "attention_bwd"), ("attention_fwd",), ("attention_bwd",)])
@pytest.mark.parametrize("packed", [True, False])
def test_what_one_saves_the_other_reads(passes: tuple[str, ...], packed: bool, library: OnCpu) -> None:
    """Forward and backward pass by the library, or one of them by our kernels: equal results and gradients."""
    if packed:
        parts = [torch.randn(2, 7, 3, 2, 16, requires_grad=True)]
        q, k, v = parts[0].unbind(2)
    else:
        q, k, v = parts = [torch.randn(2, tokens, 2, 16, requires_grad=True) for tokens in (7, 9, 9)]
    expected = plain(q, k, v)
    cotangent = torch.randn(2, 32, 7).transpose(1, 2)  # not contiguous
    wanted = torch.autograd.grad(expected, parts, cotangent)
    with table.using(by_table(*passes)), dispatch.using("auto" if "attention_fwd" in passes else "triton"):
        out = attention(*parts) if packed else attention_qkv(*parts)
    with table.using(by_table(*passes)), dispatch.using("auto"):
        gradients = torch.autograd.grad(out, parts, cotangent)
    assert library.calls == [{"attention_fwd": "forward", "attention_bwd": "backward"}[name] for name in passes]
    torch.testing.assert_close(out, expected)
    for gradient, exact in zip(gradients, wanted, strict=True):
        assert gradient.is_contiguous()
        torch.testing.assert_close(gradient, exact)


@interpreted
def test_operator_with_a_library_is_one_that_pytorch_accepts(library: OnCpu) -> None:
    qkv = torch.randn(2, 7, 3, 2, 16, requires_grad=True)
    with table.using(by_table("attention_fwd", "attention_bwd")), dispatch.using("auto"):
        torch.library.opcheck(
            attention_op, (qkv, None, None, None, None, 0.0, None, None, None, None), raise_exception=True
        )
        assert library.calls
        compiled = torch.compile(lambda qkv: attention(qkv).sin(), fullgraph=True, backend="aot_eager")
        library.calls.clear()
        with dispatch.using("attention=cudnn"):
            half = qkv.detach().bfloat16()
            torch.testing.assert_close(compiled(half), attention(half).sin())
        assert library.calls == ["forward"] * 2


@interpreted
def test_a_block_runs_fused_with_attention_of_a_library(library: OnCpu) -> None:
    block = FusedBlock(32, 2, 64).bfloat16()
    x = torch.randn(2, 7, 32).bfloat16().requires_grad_()
    results = []
    for setting in ("attention=cudnn", "*=triton"):
        with dispatch.using(setting):
            y = block(x)
            results.append((y, *torch.autograd.grad(y.float().square().sum(), [x, block.attn.qkv.bias])))
    assert library.calls == ["forward", "backward"]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


@interpreted
@pytest.mark.parametrize("option", ["bias", "dropout", "lengths", "causal", "head_dim"])
def test_what_a_library_cannot_take_is_for_our_kernels_or_an_error(option: str, library: OnCpu) -> None:
    qkv = torch.randn(2, 7, 3, 2, 80 if option == "head_dim" else 16).bfloat16()
    options = {
        "bias": {"bias": torch.zeros(7, 7)},
        "dropout": {"dropout": 0.5},
        "lengths": {"cu_seqlens": torch.tensor([0, 4, 7], dtype=torch.int32), "max_seqlen": 4},
        "causal": {"causal": True},
        "head_dim": {},
    }[option]
    qkv = qkv[0] if option == "lengths" else qkv
    with dispatch.using("attention=cudnn"):
        said = "head dimensions up to 64" if option == "head_dim" else "has no bias, dropout, scale, causal mask"
        with pytest.raises(RuntimeError, match=f"attention=cudnn was asked for, but cudnn attention .*{said}"):
            attention(qkv, **options)
    entries = by_table("attention_fwd", dtype="bfloat16").entries
    entries = tuple(Entry(e.kernel, {**e.where, "head_dim": qkv.shape[-1]}, e.use, 2.0, 1.0, 0.01, "") for e in entries)
    with table.using(Table(MEASURED, entries)), dispatch.using("auto"):
        assert attention(qkv, **options).isfinite().all()
    assert library.calls == []


@pytest.mark.parametrize("name", ["cudnn", "flash"])
@pytest.mark.parametrize("tokens", [(257, 257), (5, 9)])
def test_calls_of_the_libraries_fit_their_schemas(name: str, tokens: tuple[int, int]) -> None:
    """On the meta device, which checks arguments and computes shapes."""
    q, k, v = (torch.empty(2, n, 4, 80, dtype=torch.bfloat16, device="meta") for n in (tokens[0], tokens[1], tokens[1]))
    out, lse = providers.forward(name, q, k, v)
    assert (out.shape, out.dtype, out.is_contiguous()) == ((2, tokens[0], 320), torch.bfloat16, True)
    assert (lse.shape, lse.dtype, lse.is_contiguous()) == ((2, 4, tokens[0]), torch.float32, True)
    gradients = providers.backward(name, torch.empty_like(out), q, k, v, out, lse)
    assert [gradient.shape for gradient in gradients] == [x.shape for x in (q, k, v)]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_libraries_refuse_what_they_cannot_run(name: str) -> None:
    for shape, dtype, said in [
        ((1, 5, 3, 2, 16), torch.float32, "takes bfloat16 and float16, not torch.float32"),
        ((1, 5, 3, 2, 20), torch.bfloat16, "takes head dimensions that are multiples of 8, up to .*, not 20"),
        ((1, 5, 3, 2, 16), torch.bfloat16, "runs on an NVIDIA GPU, not on cpu"),
    ]:
        with dispatch.using(f"auto,attention={name}"), pytest.raises(RuntimeError, match=f"{name} attention {said}"):
            attention(torch.zeros(shape, dtype=dtype))


def test_flash_attention_is_asked_for_its_deterministic_form(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def backward(grad_out: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        asked.append(
            (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
        )
        return grad_out, grad_out, grad_out

    monkeypatch.setattr(providers, "aten", SimpleNamespace(_scaled_dot_product_flash_attention_backward=backward))
    filled = torch.utils.deterministic.fill_uninitialized_memory
    x = torch.zeros(1, 2, 5, 16)
    providers.Flash().backward(x, x, x, x, x, x[..., 0])
    assert asked == [(True, True)]
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == filled


def test_compilation_ahead_of_time_is_of_our_kernels(library: OnCpu) -> None:
    meta = torch.empty(2, 7, 2, 16, dtype=torch.bfloat16, device="meta")
    with dispatch.using("attention=cudnn"):
        assert providers.chosen(providers.forward_runs, meta, plain=True) == "triton"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_libraries_agree_with_our_kernels(name: str) -> None:
    qkv = torch.randn(4, 257, 3, 4, 80, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    cotangent = torch.randn(4, 257, 320, device="cuda", dtype=torch.bfloat16)
    results = []
    for setting in ("triton", f"attention={name}"):
        with dispatch.using(setting):
            out = attention(qkv)
            results.append((out, *torch.autograd.grad(out, qkv, cotangent), launch_forward(qkv)[1]))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
