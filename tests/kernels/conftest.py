import inspect
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from fastvit_kernels import dispatch

if dispatch.INTERPRETED:
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, interpreter_builder

    # indices of tensors this small do not overflow, and to look for that takes a third of the time
    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)

    @lru_cache
    def builtins_of(package: Any) -> list[tuple[str, Any]]:
        return [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def patch_builtin(package: Any, *others: Any) -> None:
        """The interpreter looks for what to exchange at each call of a function by a kernel, a quarter of its time."""
        for name, member in builtins_of(package):
            if getattr(package, name) is member:  # not exchanged by the caller already
                interpreter._patch_attr(package, name, member, *others)

    interpreter._patch_builtin = patch_builtin
    interpreted_language, interpreted_grid = interpreter._patch_lang, interpreter.GridExecutor.__call__
    exchanged: set[Any] = set()  # the language's modules that are exchanged in the launch that runs now

    @lru_cache
    def languages_of(function: Any) -> frozenset[Any]:
        return frozenset(value for value in vars(inspect.getmodule(function)).values() if value in (tl, tl.core))

    def patch_language(function: Any) -> Any:
        """The interpreter exchanges the language at each call of a function by a kernel; once a launch is enough."""
        if languages_of(function) <= exchanged:
            return None  # of a call, which takes nothing back
        exchanged.update(languages_of(function))
        return interpreted_language(function)

    def launch(grid: Any, *args: Any, **kwargs: Any) -> None:
        exchanged.clear()
        interpreted_grid(grid, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_language, launch
    interpreted_dot = InterpreterBuilder.create_dot

    def dot_of_numbers(builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *others: Any) -> TensorHandle:
        """The interpreter (Triton 3.7) keeps bfloat16 as uint16 and multiplies those; this multiplies the numbers."""
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32) for t in (a, b))
        return interpreted_dot(builder, a, b, *others)

    InterpreterBuilder.create_dot = dot_of_numbers
    interpreted_cast = InterpreterBuilder.cast_impl

    def rounding_cast(builder: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
        """The interpreter truncates float32 to bfloat16; this rounds to the nearest, ties to even, as GPUs do."""
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return interpreted_cast(builder, source, target)
        bits = source.data.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return TensorHandle(np.where(np.isnan(source.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)

    InterpreterBuilder.cast_impl = rounding_cast


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device(request.param)


@pytest.fixture(params=["reference", "triton"])
def implementation(request: pytest.FixtureRequest, device: torch.device) -> Iterator[str]:
    """Runs a test with plain PyTorch and with the Triton kernels: on a GPU, or on the CPU by the interpreter.

    Memory of Triton outputs is filled with NaN beforehand, so that what a kernel leaves out does not go unnoticed.
    """
    if request.param == "triton" and device.type == "cpu" and not dispatch.INTERPRETED:
        pytest.skip("does not apply: kernels need a GPU or Triton's interpreter")
    with dispatch.using(request.param):
        torch.use_deterministic_algorithms(request.param == "triton", warn_only=True)
        yield request.param
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
