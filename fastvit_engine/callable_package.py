"""Packages that can be called like the function of `fastvit_engine.api` that has their name.

`fastvit_engine.train` is a package, and what a user calls to train. Once Python has imported the package, that name
means the package everywhere, so there is no room for a function beside it. `help` shows the function: its signature and
docstring take the place of the package's.
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
    def __doc__(self) -> str:  # type: ignore[override]
        """The function's signature and docstring, then what the package says of itself."""
        function = self._function
        call = f"{function.__name__}{inspect.signature(function)}"
        return f"{call}\n\n{inspect.getdoc(function)}\n\nThe package of this name: {vars(self)['__doc__']}"

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
