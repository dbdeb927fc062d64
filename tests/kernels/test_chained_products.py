"""Head dimensions of several pieces where no product may add to the one just before it: sm_100, under older Tritons."""

import pytest
import torch
from triton.backends.compiler import GPUTarget

from fastvit_kernels import attention, dispatch
from fastvit_kernels.attention.kernels import tiles


def test_separate_products_give_what_chained_ones_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """In both passes, bit for bit: the interpreter rounds sums and differences alike."""

    def run() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        qkv = torch.randn(2, 19, 3, 2, 80, dtype=torch.bfloat16, requires_grad=True)
        with dispatch.using("triton"):
            out = attention(qkv)
        out.backward(torch.randn_like(out))
        assert qkv.grad is not None
        return out.detach(), qkv.grad

    def never() -> bool:
        asked.append(True)
        return False

    asked: list[bool] = []
    chained = run()
    monkeypatch.setattr(tiles, "products_may_chain", never)
    separate = run()
    assert asked
    assert all(torch.equal(one, other) for one, other in zip(chained, separate, strict=True))


@pytest.mark.parametrize(
    ("target", "version", "may"),
    [
        (None, (3, 7), True),
        (GPUTarget("cuda", 90, 32), (3, 7), True),
        (GPUTarget("cuda", 100, 32), (3, 7), False),
        (GPUTarget("cuda", 103, 32), (3, 8), False),
        (GPUTarget("cuda", 100, 32), (3, 10), True),
        (GPUTarget("cuda", 120, 32), (3, 7), True),
        (GPUTarget("hip", "gfx942", 64), (3, 7), True),
    ],
)
def test_products_are_separate_where_triton_chains_them_wrongly(
    target: GPUTarget | None, version: tuple[int, int], may: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "current_target", lambda: target)
    monkeypatch.setattr(tiles, "TRITON", version)
    assert tiles.products_may_chain() is may
