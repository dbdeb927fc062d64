"""Lets torchvision be imported beside a PyTorch of another build, for what imports it and does not compute with it."""

import importlib.util
import sys
from pathlib import Path

import torch

_declared: list[torch.library.Library] = []  # operators live as long as their library


def declare_torchvision_operators() -> None:
    """Declares two operators whose absence makes `import torchvision` fail, if its compiled part cannot be loaded.

    timm and transformers import it for transforms of images; their models call none of its operators. A call of these
    two raises an error.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations or "torchvision" in sys.modules:
        return
    try:
        for library in Path(spec.submodule_search_locations[0]).glob("_C*.so"):
            torch.ops.load_library(str(library))
    except OSError:
        if not hasattr(torch.ops.torchvision, "nms"):
            operators = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _declared.append(operators)
