"""Detects which `apex` is installed, and what it can do.

NVIDIA's apex is built from source, part by part. In the package index its name belongs to a toolkit for a web
framework. So it is judged by the parts it has, without importing the other package.
"""

import importlib.util
from pathlib import Path
from typing import Literal

FROM_SOURCE = "build NVIDIA's from github.com/NVIDIA/apex, with APEX_CPP_EXT=1 APEX_CUDA_EXT=1"
# Extensions that the two do not build, and the variables that apex's setup.py reads for them.
APART = {"fast_layer_norm": "APEX_FAST_LAYER_NORM=1", "xentropy_cuda": "APEX_XENTROPY=1"}
# What each of its modules needs compiled.
EXTENSIONS = {
    "apex.normalization.fused_layer_norm": "fused_layer_norm_cuda",
    "apex.contrib.layer_norm.layer_norm": "fast_layer_norm",
    "apex.optimizers.fused_adam": "amp_C",
    "apex.optimizers.fused_lamb": "amp_C",
    "apex.fused_dense.fused_dense": "fused_dense_cuda",
    "apex.contrib.xentropy.softmax_xentropy": "xentropy_cuda",
}


def installed_apex() -> tuple[Literal["none", "nvidia", "other"], list[Path]]:
    """Whose apex is installed, and the folders of the package. Raises ImportError or ValueError if nothing can tell."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "none", []
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    is_nvidias = any((folder / "multi_tensor_apply").is_dir() for folder in folders)
    return "nvidia" if is_nvidias else "other", folders


def obstacle(module: str) -> str | None:
    """Why a module of NVIDIA's apex cannot be used, or None."""
    extension = EXTENSIONS[module]
    from_source = f"{FROM_SOURCE} {APART[extension]}" if extension in APART else FROM_SOURCE
    try:
        kind, folders = installed_apex()
    except (ImportError, ValueError) as error:  # something put a half-made module in its place
        return f"the package apex here cannot be looked into: {error}"
    if kind == "none":
        return f"apex is not installed: {from_source}"
    if kind == "other":
        return f"the package apex here is not NVIDIA's (the package index has another one of that name): {from_source}"
    file = Path(*module.split(".")[1:]).with_suffix(".py")
    if not any((folder / file).is_file() for folder in folders):
        return f"this version of apex has no {module}"
    if importlib.util.find_spec(extension) is None:
        return f"apex was installed without its extension {extension}: {from_source}"
    return None
