"""torchvision's wheel cannot load its operations beside a torch of another build, and then cannot be imported.

timm and open_clip import it for image transforms, which no test uses; two operators must exist for the import.
"""

import collections
import importlib.util
from pathlib import Path

import pytest
import torch

import fastvit_kernels.integrations.block
import fastvit_kernels.integrations.layers


def torchvision_operators() -> torch.library.Library | None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        for library in Path(spec.submodule_search_locations[0]).glob("_C*.so"):
            torch.ops.load_library(str(library))
        return None
    except OSError:
        if hasattr(torch.ops.torchvision, "nms"):
            return None  # somebody else was here
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return operators


TORCHVISION = torchvision_operators()  # operators live as long as their library


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """How often each operation has run: equal results prove nothing unless the fused path gave them."""
    counter: collections.Counter[str] = collections.Counter()

    def count(module: object, name: str) -> None:
        operation = getattr(module, name)

        def counted(*args: object, **kwargs: object) -> object:
            counter[name] += 1
            return operation(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    halves = ("attention_block", "layer_norm_mlp", "layer_norm_swiglu", "attention", "rotary_qk_norm")
    for name in ("transformer_block", *halves):
        count(fastvit_kernels.integrations.block, name)
    for name in ("layer_norm", "patch_embed"):
        count(fastvit_kernels.integrations.layers, name)
    return counter
