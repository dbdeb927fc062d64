"""The changed interpreter makes the types that Triton makes, and rounds as PyTorch does."""

import numpy as np
import pytest
import torch

from fastvit_kernels import dispatch

if not dispatch.INTERPRETED:
    pytest.skip("does not apply: kernels need a GPU or Triton's interpreter", allow_module_level=True)

import triton.language as tl
from triton.runtime.interpreter import TensorHandle, interpreter_builder

from tests.kernels import interpreter


@pytest.mark.parametrize(
    "shape", [[1], [16], [1, 64], [4, 2, 8], [tl.constexpr(32), 2], tl.tuple([8, tl.constexpr(4)])]
)
@pytest.mark.parametrize("element", [tl.bfloat16, tl.int1, tl.pointer_type(tl.float32)])
def test_types_of_blocks_are_those_of_triton(shape: list[int], element: tl.dtype) -> None:
    theirs = tl.block_type.__new__(tl.block_type)
    interpreter.original_block(theirs, element, shape)
    for _ in range(2):  # the second is remembered
        ours = tl.block_type(element, shape)
        assert ours == theirs and ours.scalar is element
        assert (str(ours), ours.numel, list(ours.shape)) == (str(theirs), theirs.numel, list(theirs.shape))
        tensor, expected = tl.tensor(None, ours), tl.tensor.__new__(tl.tensor)
        interpreter.original_tensor(expected, None, theirs)
        assert [s.value for s in tensor.shape] == [s.value for s in expected.shape] == list(theirs.shape)
        assert tensor.numel.value == expected.numel.value and tensor.dtype is expected.dtype


def test_a_scalar_has_one_number() -> None:
    tensor = tl.tensor(None, tl.float32)
    assert len(tensor.shape) == 0 and tensor.numel.value == 1 and tensor.type is tensor.dtype is tl.float32


@pytest.mark.parametrize(
    ("shape", "error", "said"), [([3], ValueError, "power of 2"), ([], TypeError, "0d block_type")]
)
def test_what_triton_refuses_is_refused(shape: list[int], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        tl.block_type(tl.float32, shape)


def test_every_bfloat16_is_widened_exactly() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    wide = interpreter_builder.cast_impl(TensorHandle(bits, tl.bfloat16), tl.float32).data
    expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert np.array_equal(wide, expected, equal_nan=True)


def test_float32_is_rounded_to_the_nearest_bfloat16() -> None:
    ties = np.arange(2**16, dtype=np.uint32) << 16 | 0x8000
    bits = np.concatenate([ties - 1, ties, ties + 1])
    near = interpreter_builder.cast_impl(TensorHandle(bits.view(np.float32), tl.float32), tl.bfloat16).data
    expected = torch.from_numpy(bits.view(np.float32)).bfloat16()
    assert torch.equal(torch.from_numpy(near.view(np.int16)).view(torch.bfloat16).nan_to_num(), expected.nan_to_num())
