"""Seeing which Triton kernels a piece of code launches."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

if importlib.util.find_spec("triton") is None:  # where plain PyTorch alone runs
    KERNELS: tuple[Any, ...] = ()
else:
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    KERNELS = (JITFunction, InterpretedFunction)


@contextmanager
def launched_by(instead: Callable[..., Any]) -> Iterator[None]:
    """Inside, a launch of a kernel calls `instead(run, kernel, *arguments, **options)`; `run` would launch it."""
    runs = {kind: kind.run for kind in KERNELS}

    def replacement(run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda kernel, *arguments, **options: instead(run, kernel, *arguments, **options)

    for kind, run in runs.items():
        kind.run = replacement(run)
    try:
        yield
    finally:
        for kind, run in runs.items():
            kind.run = run


@contextmanager
def launches() -> Iterator[set[str]]:
    """The names of the kernels that are launched inside, in a set that grows."""
    names: set[str] = set()

    def noted(run: Callable[..., Any], kernel: Any, *arguments: Any, **options: Any) -> Any:
        names.add(kernel.fn.__name__)
        return run(kernel, *arguments, **options)

    with launched_by(noted):
        yield names
