"""Getting hold of peers, each of which may be absent, broken or not for this machine."""

import importlib
import importlib.metadata
import importlib.util
import warnings
from typing import Any

import torch

from benchmarks.apex_detection import first_line
from benchmarks.registry import Case, Unusable
from fastvit_engine.torchvision_operators import declare_torchvision_operators


def need(module: str) -> Any:
    """An installed module, or Unusable."""
    package = module.partition(".")[0]
    try:
        if importlib.util.find_spec(package) is None:
            raise Unusable(f"{package} is not installed")
        with warnings.catch_warnings(action="ignore"):
            return importlib.import_module(module)
    except Unusable:
        raise
    except Exception as error:  # a peer of another build may throw anything
        raise Unusable(f"{module} does not import: {first_line(error)}") from error


def need_cuda(case: Case, half: bool = False) -> None:
    """Unusable unless the case is on an NVIDIA GPU and, with `half`, in a 16-bit dtype."""
    if case.device.type != "cuda" or torch.version.hip:
        raise Unusable("needs an NVIDIA GPU")
    if half and case.dtype == torch.float32:
        raise Unusable("takes bf16 and fp16 only")


def need_vision(module: str) -> Any:
    """A module of timm or transformers, which import torchvision and compute with none of its operators."""
    declare_torchvision_operators()
    return need(module)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def compiled(function: Any, mode: str | None = None) -> Any:
    """`torch.compile` for one size.

    max-autotune runs without CUDA graphs: they reuse the memory of results that the measurement still holds, and would
    leave the host's time out for one provider only.
    """
    return torch.compile(function, dynamic=False, mode=mode)


MAX_AUTOTUNE = "max-autotune-no-cudagraphs"
