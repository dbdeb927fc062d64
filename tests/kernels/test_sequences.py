"""A block over sequences of different lengths, one after the other, computes each as if it were alone."""

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit_kernels import FusedBlock, attention_block, transformer_block
from tests.kernels.numerics import assert_accurate
from tests.kernels.test_block import BLOCK, inputs, plain

pytestmark = pytest.mark.usefixtures("implementation")
ENDS = (0, 5, 6, 13, 13, 18)  # one of them is empty
TOKENS = 20  # the last two are of no sequence
X = torch.randn(1, 4, 16)
LENGTHS = torch.tensor([0, 4], dtype=torch.int32)


def each_alone(ends: tuple[int, ...], outputs: int | None, **tensors: Any) -> Tensor:
    """What `plain` makes of each sequence of x [1, T, D] by itself."""
    x = tensors.pop("x")
    spans = [(first, last) for first, last in pairwise(ends) if first < last]
    return torch.cat([plain(x=x[:, first:last], **tensors)[:, :outputs] for first, last in spans], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [None, 2])
def test_each_sequence_as_alone(outputs: int | None, dtype: torch.dtype, device: torch.device) -> None:
    ends = ENDS if outputs is None else (0, 5, 7, 13, 18)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
    ours = partial(transformer_block, **BLOCK, outputs=outputs, cu_seqlens=cu_seqlens, max_seqlen=7)
    tensors = inputs(1, 18, 48, 100, True)
    assert_accurate(ours, partial(each_alone, ends, outputs), tensors, dtype, device)


def test_tokens_of_no_sequence_change_no_other(device: torch.device) -> None:
    torch.manual_seed(0)
    block = FusedBlock(16, 2, 24).to(device)
    x = torch.randn(1, TOKENS, 16, device=device)
    cu_seqlens = torch.tensor(ENDS, dtype=torch.int32, device=device)
    whole = block(x, cu_seqlens=cu_seqlens, max_seqlen=7)
    assert whole.shape == x.shape
    short = block(x[:, :18], cu_seqlens=cu_seqlens, max_seqlen=7)
    torch.testing.assert_close(whole[:, :18], short, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"causal": True}, "causal cannot be combined with cu_seqlens"),
        ({"drop_path": 0.5}, "drop_path cannot be combined with cu_seqlens"),
        ({"rel_pos_embed": torch.zeros(7, 8)}, "rel_pos_embed cannot be combined with cu_seqlens"),
        ({"max_seqlen": None}, "cu_seqlens and max_seqlen must be given together"),
        ({"x": X.expand(2, -1, -1)}, r"x must have shape \[1, T, D\] with cu_seqlens"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    block = FusedBlock(16, 2, 24)
    arguments: dict[str, Any] = {
        "x": X,
        "norm_weight": block.norm1.weight,
        "norm_bias": block.norm1.bias,
        "qkv_weight": block.attn.qkv.weight,
        "qkv_bias": block.attn.qkv.bias,
        "proj_weight": block.attn.proj.weight,
        "proj_bias": block.attn.proj.bias,
        "heads": 2,
        "eps": 1e-6,
        "cu_seqlens": LENGTHS,
        "max_seqlen": 4,
    }
    with pytest.raises(ValueError, match=message):
        attention_block(**{**arguments, **change})


@pytest.mark.parametrize("mode", ["mask", "subset"])
def test_a_module_in_training_does_not_drop_the_path_of_a_sequence(mode: str) -> None:
    block = FusedBlock(16, 2, 24, drop_path=0.5, drop_path_mode=mode)
    with pytest.raises(ValueError, match="drop_path cannot be combined"):
        block(X, cu_seqlens=LENGTHS, max_seqlen=4)
    assert block.eval()(X, cu_seqlens=LENGTHS, max_seqlen=4).shape == X.shape
