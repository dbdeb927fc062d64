"""Triton's interpreter, which runs kernels on the CPU: several times faster, and with the rounding of GPUs.

The interpreter works out the types of a kernel's values anew at every step of every program. Most of its time goes
there; what is asked again and again is remembered here. Imported once, where kernels are interpreted.
"""

import inspect
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, interpreter_builder

# indices of tensors this small do not overflow, and to look for that takes a third of the time
interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)


# The language is exchanged for an interpreted one, at each call of a function by a kernel; once a launch is enough


@cache
def builtins_of(package: Any) -> list[tuple[str, Any]]:
    return [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def patch_builtin(package: Any, *others: Any) -> None:
    for name, member in builtins_of(package):
        if getattr(package, name) is member:  # not exchanged by the caller already
            interpreter._patch_attr(package, name, member, *others)


@cache
def languages_of(function: Any) -> frozenset[Any]:
    return frozenset(value for value in vars(inspect.getmodule(function)).values() if value in (tl, tl.core))


def patch_language(function: Any) -> Any:
    if languages_of(function) <= exchanged:
        return None  # of a call, which takes nothing back
    exchanged.update(languages_of(function))
    return interpreted_language(function)


def launch(grid: Any, *args: Any, **kwargs: Any) -> None:
    exchanged.clear()
    interpreted_grid(grid, *args, **kwargs)


exchanged: set[Any] = set()  # the language's modules that are exchanged in the launch that runs now
interpreted_language, interpreted_grid = interpreter._patch_lang, interpreter.GridExecutor.__call__
interpreter._patch_builtin, interpreter._patch_lang = patch_builtin, patch_language
interpreter.GridExecutor.__call__ = launch


# Types of blocks and tensors: what follows from a shape is found out once


class Shape(NamedTuple):
    """What types and tensors of one shape share: no one writes to it."""

    dims: tl.tuple
    text: str
    numel: int
    constants: tl.tuple  # as `tl.constexpr`
    constant_numel: tl.constexpr


@cache
def shape_of(dims: tuple[int, ...]) -> Shape:
    if dims:  # with the checks of Triton, and as it writes names
        made = tl.block_type.__new__(tl.block_type)
        original_block(made, tl.float32, list(dims))
        values, text, numel = made.shape, str(made.shape), made.numel
    else:
        values, text, numel = tl.tuple([]), "", 1
    return Shape(values, text, numel, tl.tuple([tl.constexpr(d) for d in dims]), tl.constexpr(numel))


def make_block(self: Any, element_ty: tl.dtype, shape: Any) -> None:
    dims = tuple(d.value if isinstance(d, tl.constexpr) else d for d in shape)
    if not dims:
        return original_block(self, element_ty, shape)  # which refuses it
    self.of_shape = known = shape_of(dims)
    self.element_ty, self.shape, self.numel = element_ty, known.dims, known.numel
    self.name = f"<{known.text}, {element_ty.name}>"


def make_tensor(self: Any, handle: Any, type: tl.dtype) -> None:
    known = type.of_shape if type.is_block() else shape_of(())
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = known.constants, known.constant_numel


original_block, original_tensor = tl.block_type.__init__, tl.tensor.__init__
tl.block_type.__init__, tl.tensor.__init__ = make_block, make_tensor
numpy_dtypes: dict[str, np.dtype] = {}  # by the name of a scalar type
interpreted_dtype = interpreter._get_np_dtype


def numpy_dtype(dtype: tl.dtype) -> np.dtype:
    name = dtype.scalar.name
    if name not in numpy_dtypes:
        numpy_dtypes[name] = interpreted_dtype(dtype.scalar)
    return numpy_dtypes[name]


interpreter._get_np_dtype = numpy_dtype


# bfloat16 and FP8, which the interpreter (Triton 3.7) keeps as uint16 and uint8

FP8 = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}


def dot_of_numbers(builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *others: Any) -> TensorHandle:
    """The interpreter multiplies the uint16, and loses a NaN of FP8; this multiplies the numbers."""
    if a.dtype.scalar == tl.bfloat16:
        a, b = (TensorHandle(widened(t.data), tl.float32) for t in (a, b))
    if a.dtype.scalar.name in FP8:
        a, b = (TensorHandle(from_fp8(t.data, t.dtype.scalar.name), tl.float32) for t in (a, b))
    return interpreted_dot(builder, a, b, *others)


def rounding_cast(builder: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
    """The interpreter truncates float32; this rounds to the nearest, ties to even, as GPUs do."""
    scalars = source.dtype.scalar.name, target.scalar.name
    if scalars[0] == "fp32" and scalars[1] in FP8:
        return TensorHandle(to_fp8(source.data, scalars[1]), target.scalar)
    if scalars[0] in FP8 and scalars[1] == "fp32":
        return TensorHandle(from_fp8(source.data, scalars[0]), tl.float32)
    if scalars == ("bf16", "fp32"):
        return TensorHandle(widened(source.data), tl.float32)
    if scalars != ("fp32", "bf16"):
        return interpreted_cast(builder, source, target)
    bits = source.data.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return TensorHandle(np.where(np.isnan(source.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)


def to_fp8(numbers: np.ndarray, name: str) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(numbers)).to(FP8[name]).view(torch.uint8).numpy()


def from_fp8(bits: np.ndarray, name: str) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(bits)).view(FP8[name]).float().numpy()


def rounding_conversion(builder: InterpreterBuilder, source: TensorHandle, target: tl.dtype, mode: Any) -> TensorHandle:
    """How the language asks for conversions to and from FP8."""
    return rounding_cast(builder, source, target)


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


interpreted_dot, interpreted_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = dot_of_numbers, rounding_cast
InterpreterBuilder.create_fp_to_fp = rounding_conversion
