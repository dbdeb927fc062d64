"""Objectives of one's own: from `MODULE:NAME`, as `train.objective` writes it, to what builds them, and back."""

import os
import sys
import traceback
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from types import ModuleType

from fastvit_engine.errors import UserError
from fastvit_engine.objectives.protocol import ObjectiveFactory


def import_factory(path: str) -> ObjectiveFactory:
    """What `MODULE:NAME` names. Runs the module, which may be in the working directory, as with `python -m`.

    Raises UserError if the module cannot be imported, or has no such name that can be called.
    """
    module_name, _, name = path.partition(":")
    module = _imported(module_name, path)
    try:
        factory: ObjectiveFactory = attrgetter(name)(module)
    except AttributeError:
        raise UserError(f"train.objective is {path}, and {_file_of(module)} has no {name}: correct the name") from None
    if not callable(factory):
        raise UserError(
            f"train.objective is {path}, and {name} is no class or function: name what is called with a Config and a "
            "device, and returns the objective"
        )
    return factory


def import_path(factory: ObjectiveFactory) -> str:
    """The `MODULE:NAME` by which runs record what builds their objective; a script is called as if it was imported.

    Raises UserError for what has none, such as a lambda: a resume could not tell it from another.
    """
    name, module_name = getattr(factory, "__qualname__", ""), getattr(factory, "__module__", None) or ""
    module = sys.modules.get(module_name)
    try:
        found = attrgetter(name)(module)
    except AttributeError:
        found = None
    if module is None or not callable(factory) or found != factory:
        raise UserError(
            f"objective is {factory!r}, which is no class or function at the top level of a module, so a resumed run "
            "could not recognise it: define one there, which is called with a Config and a device"
        )
    return f"{_script_name(module) if module_name == '__main__' else module_name}:{name}"


def _imported(module_name: str, path: str) -> ModuleType:
    here = os.getcwd()
    if not sys.flags.safe_path and here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module_name}.".startswith(f"{missing}."):
            raise UserError(
                f"train.objective is {path}, and there is no module {missing} in {here} or among the installed ones: "
                "start in its folder on every machine, or add the folder to PYTHONPATH"
            ) from None
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"train.objective is {path}, and importing {module_name} fails with {type(error).__name__} ({error}) in "
            f"{frame.filename}, line {frame.lineno}: fix the module"
        ) from error


def _file_of(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or module.__name__


def _script_name(module: ModuleType) -> str:
    """What a module that runs as `__main__` is called where it is imported; `__main__` if it has no such name."""
    spec, file = getattr(module, "__spec__", None), getattr(module, "__file__", None)
    if spec is not None:  # python -m NAME
        return str(spec.name)
    stem = Path(file).stem if file else ""
    return stem if stem.isidentifier() else module.__name__
