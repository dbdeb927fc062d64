"""A kernel of the user's own among the providers: `fastvit bench kernels --ops NAME --provider FILE.py:FUNCTION`."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.apex_detection import first_line
from benchmarks.registry import Case, Op, Provider, functional
from benchmarks.shapes import QUICK_CPU_SHAPES


def with_providers(ops: Sequence[Op], chosen: Sequence[str], given: Sequence[str]) -> list[Op]:
    """The operations, the only chosen one with a provider for each of `given`, FILE.py:FUNCTION.

    FUNCTION takes the operation's tensors by name and returns its outputs; autograd gives the gradients. ValueError
    unless one operation is chosen, and for a file or function that is not there or cannot be loaded.
    """
    if not given:
        return list(ops)
    if len(chosen) != 1:
        raise ValueError(
            f"--provider is a kernel for one operation: name it with --ops, one of {', '.join(op.name for op in ops)}"
        )
    known = {op.name: op for op in ops}
    if not takes_functions(known[chosen[0]]):
        raise ValueError(f"--provider: {chosen[0]} updates its tensors in place, and takes no function of yours")
    return [
        replace(op, providers=(*op.providers, *(provider(place) for place in given))) if op.name == chosen[0] else op
        for op in ops
    ]


def provider(place: str) -> Provider:
    function = load(place)
    path, _, name = place.rpartition(":")
    return Provider(f"{Path(path).name}:{name}", functional(lambda case: function), own=True)


def load(place: str) -> Callable[..., Any]:
    """The function at FILE.py:FUNCTION. Raises ValueError if there is none."""
    path, colon, name = place.rpartition(":")
    if not (colon and path.endswith(".py") and name.isidentifier()):
        raise ValueError(f"--provider {place}: give a file and a function in it, FILE.py:FUNCTION")
    if not Path(path).is_file():
        raise ValueError(f"--provider {place}: there is no file {path}")
    try:
        module = imported(Path(path).resolve())
    except (Exception, SystemExit) as error:
        raise ValueError(f"--provider {place}: {path} cannot be imported: {first_line(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"--provider {place}: {path} has no function {name}; it has {', '.join(functions) or 'none at all'}"
        )
    return function


@lru_cache
def imported(path: Path) -> ModuleType:
    """The module of a file, which runs once however many of its functions are measured."""
    spec = importlib.util.spec_from_file_location(f"provider_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where Triton and pickle look a function's module up
    sys.path.insert(0, str(path.parent))  # a kernel may import its neighbours
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def signature(op: Op, *, sizes: bool) -> str:
    """The tensors that a function for this operation takes, by name, and their sizes at that of tiny/14@56."""
    if not takes_functions(op):
        return "none: it updates its tensors in place"
    shape = QUICK_CPU_SHAPES[-1]
    case = Case(op, shape, shape.batches[0], op.dtype or torch.float32, torch.device("cpu"))
    tensors = case.inputs(seed=0)
    return ", ".join(f"{name} {list(tensor.shape)}" if sizes else name for name, tensor in tensors.items())


def takes_functions(op: Op) -> bool:
    return "backward" in op.passes
