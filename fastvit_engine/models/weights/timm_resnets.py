"""How timm names and builds the ResNets of BiT and the hybrids, whose parameter names are ours."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastvit_engine.config import ModelConfig
from fastvit_engine.config.model_shape import resolve_shape
from fastvit_engine.config.resnet_shape import ResNetShape, bit_shape, hybrid_of

# timm's architecture of each ResNet before a Transformer, by its blocks, and the size of that architecture.
HYBRIDS = {
    (): ("vit_tiny_r_s16_p8_224", "Ti"),
    (2, 2, 2, 2): ("vit_base_r26_s32_224", "B"),
    (3, 4, 9): ("vit_base_r50_s16_224", "B"),
    (3, 4, 6, 3): ("vit_large_r50_s32_224", "L"),
}
_BIT = ("50x1", "50x3", "101x1", "101x3", "152x2", "152x4")  # of which timm has an architecture
_SIZES = {"tiny": "Ti", "small": "S", "base": "B", "large": "L"}
_HYBRID_NAME = re.compile(r"vit_([a-z]+)_(r\d{0,3})_s(\d{1,3})(?:_p8)?(?:_\d+)?(?:\.\S*)?")
_BIT_NAME = re.compile(r"resnetv2_(\d+x\d+)_bit(?:\.\S*)?")
IMAGE_SIZE = 224  # of a ResNet whose source does not say it: no parameter depends on it

# Our models compute as the authors' code. timm's arguments say it of BiT; of hybrids, one number can be set afterwards.
_BIT_CODE = """\
from functools import partial
from timm.layers import StdConv2d
from timm.models.resnetv2 import ResNetV2
model = ResNetV2({stages}, width_factor={factor}, num_classes={classes}, stem_type='fixed',
                 conv_layer=partial(StdConv2d, eps=1e-10))"""
HYBRID_CODE = """\
for module in model.modules():
    if isinstance(module, torch.nn.GroupNorm):
        module.eps = 1e-6  # of the authors"""


def bit_code(config: ModelConfig) -> str:
    """Lines of Python that build timm's model for the weights of a ResNet."""
    resnet = resolve_shape(config).resnet
    assert resnet is not None
    return _BIT_CODE.format(stages=list(resnet.stages), factor=resnet.width // 64, classes=config.num_classes)


def bit_architecture(config: ModelConfig) -> str | None:
    """timm's name of a ResNet; None if it has none."""
    return f"resnetv2_{config.name[1:]}_bit" if config.name[1:] in _BIT else None


def hybrid_architecture(resnet: ResNetShape) -> tuple[str, str]:
    """timm's name of a hybrid of this ResNet, and the size of its Transformer."""
    return HYBRIDS[resnet.stages]


def bit_of(name: str, shapes: Mapping[str, Sequence[int]], image_size: int | None) -> dict[str, Any] | None:
    """The section `model` of a ResNet of BiT under a name of the papers or of timm; None for other names."""
    match = _BIT_NAME.fullmatch(name)
    name = f"R{match[1]}" if match else name
    if bit_shape(name) is None:
        return None
    head = shapes.get("head.fc.weight", (0,))
    return {"name": name, "image_size": image_size or IMAGE_SIZE, "num_classes": head[0] if head else 0}


def hybrid_named(name: str) -> tuple[ResNetShape, str] | None:
    """The ResNet of a hybrid under a name of the papers or of timm, and the size of its Transformer; or None."""
    match = _HYBRID_NAME.fullmatch(name)
    if match and match[1] in _SIZES:
        name = f"{match[2].upper()}+{_SIZES[match[1]]}/{match[3]}"
    hybrid = hybrid_of(name.replace("ViT-", ""))
    return None if hybrid is None else (hybrid.resnet, hybrid.size)
