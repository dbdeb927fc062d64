"""Imports a module of one's own that a setting names, such as that of an objective: with a sentence if it cannot."""

import os
import sys
import traceback
from importlib import import_module
from types import ModuleType

from fastvit_engine.errors import UserError


def import_own(module_name: str, setting: str) -> ModuleType:
    """Runs and returns a module, which may be in the working directory, as with `python -m`.

    setting: the key and its value, "train.objective is focal:Focal", for the sentence. Only for names from a recipe or
    the command line, which are trusted: one that a file holds must import nothing.

    Raises UserError if the module cannot be imported.
    """
    here = os.getcwd()
    if not sys.flags.safe_path and here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module_name}.".startswith(f"{missing}."):
            raise UserError(
                f"{setting}, and there is no module {missing} in {here} or among the installed ones: start in its "
                "folder on every machine, or add the folder to PYTHONPATH"
            ) from None
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{setting}, and importing {module_name} fails with {type(error).__name__} ({error}) in "
            f"{frame.filename}, line {frame.lineno}: fix the module"
        ) from error
