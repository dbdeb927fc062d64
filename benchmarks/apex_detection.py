"""Imports what NVIDIA's apex can do here, or says why it cannot: see fastvit_engine/nvidia_apex.py."""

import importlib
from typing import Any

from benchmarks.registry import Unusable
from fastvit_engine.nvidia_apex import obstacle


def need_apex(module: str) -> Any:
    """A module of NVIDIA's apex, or Unusable with what to do."""
    reason = obstacle(module)
    if reason is not None:
        raise Unusable(reason)
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever a package of another build throws
        raise Unusable(f"{module} does not import: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
