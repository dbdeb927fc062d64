"""Objectives of one's own: from `MODULE:NAME`, as `train.objective` writes it, to what builds them, and back."""

import sys
from operator import attrgetter
from pathlib import Path
from types import ModuleType

from fastvit_engine.errors import UserError
from fastvit_engine.objectives.protocol import ObjectiveFactory
from fastvit_engine.own_module import import_own


def import_factory(path: str) -> ObjectiveFactory:
    """What `MODULE:NAME` names. Runs the module, which may be in the working directory, as with `python -m`.

    Raises UserError if the module cannot be imported, or has no such name that can be called.
    """
    module_name, _, name = path.partition(":")
    module = import_own(module_name, f"train.objective is {path}")
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


def _file_of(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or module.__name__


def _script_name(module: ModuleType) -> str:
    """What a module that runs as `__main__` is called where it is imported; `__main__` if it has no such name."""
    spec, file = getattr(module, "__spec__", None), getattr(module, "__file__", None)
    if spec is not None:  # python -m NAME
        return str(spec.name)
    stem = Path(file).stem if file else ""
    return stem if stem.isidentifier() else module.__name__
