"""Packages that only some settings need."""

import importlib.util

from fastvit_engine.errors import UserError


def require(setting: str, extra: str, *modules: str) -> None:
    """Raises UserError, with what to install, if one of these modules is missing; `extra` of this package brings it."""
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        raise UserError(
            f"{setting} needs the package {missing[0]}, which is not installed: pip install 'fastvit-engine[{extra}]', "
            "or change the setting"
        )
