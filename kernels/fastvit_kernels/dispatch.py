"""Chooses which implementation of an operation runs, Triton or plain PyTorch, and says why.

`FASTVIT_KERNELS=auto|triton|reference` is read once, at import; another value is a ValueError there, and a sentence
from `python -m fastvit_kernels...`. `auto`, the default, runs Triton kernels on CUDA and ROCm tensors of float32,
bfloat16 or float16, and plain PyTorch on all others and under a transform (`transforms.py`). `triton` and `reference`
are never replaced by the other: what they cannot run is an error.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastvit_kernels import table, transforms

CHOICES = ("auto", "triton", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # kernels compute in float32, so not float64
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton's interpreter runs kernels on the CPU, for tests. Triton reads the variable when it is imported.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"

choice = os.environ.get("FASTVIT_KERNELS") or "auto"  # empty is unset, as for most variables
if choice not in CHOICES:
    table.refuse_variable(f"FASTVIT_KERNELS must be one of {', '.join(CHOICES)}, got {choice!r}")


def uses_triton(tensor: Tensor, obstacle: str | None = None) -> bool:
    """Whether an operation on this tensor runs its Triton kernel. Raises RuntimeError if it must and cannot.

    `obstacle` says why the kernels of this operation cannot take this call, or is None.
    """
    if choice == "reference":
        return False
    runs = HAS_TRITON and tensor.dtype in KERNEL_DTYPES and (tensor.is_cuda or (INTERPRETED and choice == "triton"))
    if runs and obstacle is None:
        obstacle = transforms.obstacle()
    if choice == "triton" and not (runs and obstacle is None):
        raise RuntimeError(_refusal(tensor, obstacle))
    return runs and obstacle is None


@contextmanager
def using(implementation: str) -> Iterator[None]:
    """Overrides the environment's choice inside the `with` block: "auto", "triton" or "reference"."""
    global choice
    if implementation not in CHOICES:
        raise ValueError(f"implementation must be one of {', '.join(CHOICES)}, got {implementation!r}")
    before, choice = choice, implementation
    try:
        yield
    finally:
        choice = before


def explain() -> str:
    """What runs on this machine for each operation, and why, as text to print."""
    if choice == "reference":
        gpu = cpu = "reference (asked for)"
    elif not HAS_TRITON:
        gpu = cpu = "reference (triton is not installed)" if choice == "auto" else "error (triton is not installed)"
    elif choice == "triton":
        gpu, cpu = "triton", "triton, interpreted" if INTERPRETED else "error (Triton needs a GPU)"
    else:
        gpu, cpu = "triton", "reference"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    lines = [
        f"FASTVIT_KERNELS={choice}, GPU: {device}",
        table.describe(None if device == "none" else table.gpu_name(device)),
        f"{'operation':<16}{'on a GPU':<40}on the CPU",
    ]
    for folder in sorted(path.parent for path in Path(__file__).parent.glob("*/reference.py")):
        lines.append(f"{folder.name:<16}{gpu:<40}{cpu}")
    lines.append("These run the reference, or raise an error if triton is chosen: float64; attention with a head")
    lines.append("dimension above 128.")
    return "\n".join(lines)


class Gpu(NamedTuple):
    """What launch parameters may depend on."""

    arch: str  # "sm_90", "gfx942", or "interpreter"
    multiprocessors: int  # compute units on AMD
    name: str = ""  # as tuning tables have it, "H200"; empty where there are none


_compiling_for: Gpu | None = None


def gpu(device: torch.device) -> Gpu:
    """The GPU that a launch on this device is for."""
    return _compiling_for or _properties(device)


@contextmanager
def compiling_for(target: Gpu) -> Iterator[None]:
    """Makes launches inside the `with` block compile for a GPU that need not be here: see `tuning.codegen`."""
    global _compiling_for
    _compiling_for = target
    try:
        yield
    finally:
        _compiling_for = None


@lru_cache
def _properties(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return Gpu("interpreter", 2)
    properties = torch.cuda.get_device_properties(device)
    name = table.gpu_name(properties.name)
    if torch.version.hip:
        return Gpu(properties.gcnArchName.partition(":")[0], properties.multi_processor_count, name)
    return Gpu(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count, name)


def _refusal(tensor: Tensor, obstacle: str | None) -> str:
    if obstacle is not None:
        reason = obstacle
    elif not HAS_TRITON:
        reason = "triton is not installed"
    elif tensor.dtype not in KERNEL_DTYPES:
        reason = f"the kernels take float32, bfloat16 and float16, not {tensor.dtype}"
    else:
        reason = f"Triton runs on a GPU, not on {tensor.device}, unless TRITON_INTERPRET=1 is set before Python starts"
    return f"FASTVIT_KERNELS=triton was asked for, but {reason}"
