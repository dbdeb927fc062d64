"""Argument checks shared by the public functions: one clear sentence that names the argument."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Looks(Protocol):
    """A tensor, or what is known of one."""

    @property
    def shape(self) -> torch.Size: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


def check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


def check_parameter(
    name: str,
    tensor: Looks,
    shape: Sequence[int],
    *,
    like: Looks,
    fp32_allowed: bool = False,
    cast_to: torch.dtype | None = None,
) -> None:
    """`tensor` must have this shape and the dtype and device of `like`; `fp32_allowed` accepts float32 as well.

    `cast_to`, the dtype of autocast if it casts both, accepts every dtype that it casts: all floating ones but float64.
    """
    if tensor.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    cast = cast_to is not None and tensor.dtype.is_floating_point and tensor.dtype != torch.float64
    if tensor.dtype != like.dtype and not cast and not (fp32_allowed and tensor.dtype == torch.float32):
        raise TypeError(f"{name} must be {like.dtype} like the tensor it acts on, got {tensor.dtype}")
    check_device(name, tensor, like=like)


def check_device(name: str, tensor: Looks, *, like: Looks) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")


def check_rate(name: str, rate: float) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {rate}")


def check_tokens(name: str, tensor: Tensor) -> None:
    check_floating(name, tensor)
    if tensor.ndim != 3 or tensor.shape[-1] == 0:
        raise ValueError(f"{name} must have shape [B, N, D], got {list(tensor.shape)}")


def checked_outputs(outputs: int | None, x: Tensor) -> int | None:
    """None if the result has all tokens of x [B, N, D]."""
    if outputs is not None and not 1 <= outputs <= x.shape[1]:
        raise ValueError(f"outputs must be at least 1 and at most the {x.shape[1]} tokens of x, got {outputs}")
    return None if outputs == x.shape[1] else outputs
