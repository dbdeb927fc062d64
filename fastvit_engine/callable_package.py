"""Packages that can be called like the function of `fastvit_engine.api` that has their name.

`fastvit_engine.train` is a package, and what a user calls to train. Once Python has imported the package, that name
means the package everywhere, so there is no room for a function beside it.
"""

import inspect
import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._function(*arguments, **named)

    @property
    def _function(self) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module("fastvit_engine.api"), name)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function)


def make_callable(package: str) -> None:
    """Lets a package, named by its `__name__`, be called."""
    sys.modules[package].__class__ = _CallablePackage
