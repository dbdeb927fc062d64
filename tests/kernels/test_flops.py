"""What `torch.utils.flop_counter` counts of causal attention: the pairs of a query and a key that it sees."""

from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastvit_kernels import attention, attention_block, attention_qkv, dispatch
from fastvit_kernels.flops import seen


def test_pairs_are_those_under_the_mask() -> None:
    for queries, keys in product(range(5), repeat=2):
        mask = torch.ones(queries, keys).tril(keys - queries)
        assert seen(queries, keys, causal=True) == int(mask.sum())
        assert seen(queries, keys, causal=False) == queries * keys


@pytest.mark.parametrize("causal", [False, True])
def test_causal_attention(causal: bool) -> None:
    qkv = torch.randn(2, 4, 3, 2, 16, requires_grad=True)
    pairs = 2 * (4 + 3 + 2 + 1 if causal else 4 * 4)
    with dispatch.using("triton"), FlopCounterMode(display=False) as counter:
        y = attention(qkv, causal=causal)
        assert counter.get_total_flops() == 2 * 2 * pairs * 2 * 16
        y.sum().backward()
    assert counter.get_total_flops() == 7 * 2 * pairs * 2 * 16


def test_causal_block() -> None:
    norm, qkv, proj = [torch.ones(32)] * 2, [torch.ones(96, 32), torch.ones(96)], [torch.ones(32, 32), torch.ones(32)]
    totals = []
    for causal in (False, True):
        x = torch.randn(2, 4, 32, requires_grad=True)
        with dispatch.using("triton"), FlopCounterMode(display=False) as counter:
            attention_block(x, *norm, *qkv, *proj, heads=2, eps=1e-6, causal=causal).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] - totals[1] == 7 * 2 * 2 * (4 * 4 - (4 + 3 + 2 + 1)) * 32


def test_sequences_of_different_lengths() -> None:
    q, kv = torch.randn(6, 2, 16), torch.randn(5, 2, 16)
    ends_q, ends_k = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 2, 6], [0, 3, 5]))
    lengths = {"cu_seqlens_q": ends_q, "cu_seqlens_k": ends_k, "max_seqlen_q": 4, "max_seqlen_k": 3}
    with dispatch.using("triton"), FlopCounterMode(display=False) as counter:
        attention_qkv(q, kv, kv, causal=True, **lengths)
    assert counter.get_total_flops() == 2 * 2 * ((2 + 3) + (1 + 2)) * 2 * 16
