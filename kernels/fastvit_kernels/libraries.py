"""QuACK, an optional library: whether it can run here, and why not if it cannot.

What counts is what it can do: a version whose kernels this package knows, functions with the parameters that are used,
and a GPU for which both have been compiled.
"""

import importlib
import importlib.metadata
import inspect
import re
from functools import cache
from typing import Any

QUACK = "quack-kernels"  # the distribution; the package is `quack`
FIRST, BEFORE = (0, 6, 5), (0, 7)
ARCHITECTURES = ("sm_90", "sm_100")
# What is called: module, name, and parameters that it must have.
USED = (
    ("quack.activation", "sigmoid", ("x",)),
    ("quack.epilogue", "gemm_epilogue", ("outputs", "ops", "reduces")),
    ("quack.epilogue", "EpiMod.__call__", ("A", "B", "C", "out", "store_d", "config", "tuned")),
    ("quack.epilogue.math", "pexp2", ("v",)),
    ("quack.epilogue.ops", "RowVecLoad", ("name",)),
    ("quack.epilogue.ops", "RowVecReduce", ("name",)),
    (
        "quack.gemm_config",
        "GemmConfig",
        (
            "tile_m",
            "tile_n",
            "pingpong",
            "is_dynamic_persistent",
            "cluster_m",
            "cluster_n",
            "device_capacity",
        ),
    ),
)


def quack_obstacle(arch: str | None) -> str | None:
    """Why QuACK cannot multiply on a GPU of this architecture, such as "sm_90", or None. None asks for no GPU."""
    if arch is not None and arch not in ARCHITECTURES:
        return f"QuACK runs on {' and '.join(ARCHITECTURES)} here, not on {arch}"
    return unusable()


@cache
def unusable() -> str | None:
    """Why the installed QuACK, if any, cannot be used by this package. Imports it, which takes seconds."""
    try:
        version = importlib.metadata.version(QUACK)
    except importlib.metadata.PackageNotFoundError:
        return f"{QUACK} is not installed"
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    if not FIRST <= numbers < BEFORE:
        known = f"{'.'.join(map(str, FIRST))} up to, not including, {'.'.join(map(str, BEFORE))}"
        return f"{QUACK} {version} is installed, and this package knows {known}"
    for module, name, parameters in USED:
        try:
            function: Any = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            missing = set(parameters) - set(inspect.signature(function).parameters)
        except Exception as error:  # a library that is half installed can fail in any way
            return f"{QUACK} {version} cannot be used: {module}.{name}: {type(error).__name__}: {error}"
        if missing:
            return f"{QUACK} {version} cannot be used: {module}.{name} has no {', '.join(sorted(missing))}"
    return None
