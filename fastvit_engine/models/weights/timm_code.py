"""How to load our weights into timm, under the same names: the Python code that builds a model for them."""

from typing import Any

from fastvit_engine.config import ModelConfig
from fastvit_engine.config.model_shape import SIZES, resolve_shape
from fastvit_engine.config.timm_model import is_timm, timm_name
from fastvit_engine.models.timm_library import arguments
from fastvit_engine.models.weights.timm_resnets import HYBRID_CODE, bit_code, hybrid_architecture

# timm's architecture of each size: name and patch size. Its image size is 224.
ARCHITECTURES = {
    "Ti": ("vit_tiny_patch16_224", 16),
    "S": ("vit_small_patch16_224", 16),
    "B": ("vit_base_patch16_224", 16),
    "L": ("vit_large_patch16_224", 16),
    "H": ("vit_huge_patch14_224", 14),
    "g": ("vit_giant_patch14_224", 14),
    "G": ("vit_gigantic_patch14_224", 14),
    "So400m": ("vit_so400m_patch14_siglip_224", 14),
}

GLOBAL_POOLS = {"cls": "token", "gap": "avg", "map": "map"}  # timm's names of model.pool
TIMM_EPS = 1e-6  # of LayerNorm in timm's Vision Transformers

# A class, not a hook: a copy of the model has its own hidden layer then.
_WITH_HIDDEN_LAYER = """\
from collections import OrderedDict
import timm
import torch
class WithHiddenLayer(timm.models.VisionTransformer):
    def forward_head(self, x, pre_logits=False):
        x = self.pre_logits(super().forward_head(x, pre_logits=True))
        return x if pre_logits else self.head(x)
{create}
model.pre_logits = torch.nn.Sequential(OrderedDict(fc=torch.nn.Linear({width}, {width}), tanh=torch.nn.Tanh()))
model.__class__ = WithHiddenLayer"""


def timm_code(config: ModelConfig, **more: object) -> str:
    """Lines of Python after which `model.load_state_dict` takes the weights strictly, and the outputs are the same.

    timm must have its positions, see `foreign_positions`. With head: mlp the lines also add the hidden layer before the
    classifier, which timm's models do not have. more: further arguments of `create_model`, which the ResNets of BiT are
    built without. Of a hybrid, the outputs are only nearly the same: timm adds another small number to the deviation of
    its weights.
    """
    if is_timm(config):
        named, given = timm_name(config.name), {**arguments(config), **more}
        words = ", ".join([repr(named.architecture), *(f"{key}={value!r}" for key, value in given.items())])
        imports = [] if named.module is None else [f"import {named.module}"]
        return "\n".join([*imports, "import timm", f"model = timm.create_model({words})"])
    shape = resolve_shape(config)
    if not shape.is_transformer:
        return bit_code(config)
    name, given = timm_arguments(config)
    call = [repr(name), *(f"{key}={value!r}" for key, value in given.items())]
    imports = ["import timm"]
    if config.layer_norm_eps != TIMM_EPS:
        imports = ["from functools import partial", "import timm", "import torch"]
        call.append(f"norm_layer=partial(torch.nn.LayerNorm, eps={config.layer_norm_eps!r})")
    create = f"model = timm.create_model({', '.join([*call, *(f'{key}={value!r}' for key, value in more.items())])})"
    if shape.is_hybrid:
        imports = [*dict.fromkeys([*imports, "import torch"])]
        create = f"{create}\n{HYBRID_CODE}"
    if config.head == "mlp":
        code = _WITH_HIDDEN_LAYER.format(create=create, width=resolve_shape(config).width)
        return "\n".join([line for line in imports if line.startswith("from")] + [code])
    return "\n".join([*imports, create])


def timm_arguments(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """timm's architecture for a model, and the arguments of `create_model` that differ from its defaults."""
    shape, size = resolve_shape(config), config.name.partition("/")[0]
    if shape.resnet is None:
        name, patch_size = ARCHITECTURES[size]
    else:
        (name, size), patch_size = hybrid_architecture(shape.resnet), shape.patch_size  # which is that of its map
    usual = SIZES[size]
    arguments = {
        "img_size": (config.image_size, 224),
        "patch_size": (shape.patch_size, patch_size),
        "num_classes": (config.num_classes, None),  # always: some architectures have no head unless it is given
        "embed_dim": (shape.width, usual.width),
        "depth": (shape.depth, usual.depth),
        "num_heads": (shape.heads, usual.heads),
        "mlp_ratio": (_ratio(shape.width, shape.mlp_dim), _ratio(usual.width, usual.mlp_dim)),
        # timm leaves LayerScale out if its initial value is 0; the weights replace the value anyway
        "init_values": (1.0 if config.layer_scale == 0 else config.layer_scale, None),
        "act_layer": (config.activation, "gelu"),
        "reg_tokens": (config.registers, 0),
        "no_embed_class": (config.registers > 0, False),
        "pos_embed": ("none" if config.pos_embed == "none" else "learn", "learn"),
    }
    given: dict[str, Any] = {key: value for key, (value, default) in arguments.items() if value != default}
    if config.pool != "cls":
        given |= {"class_token": False, "global_pool": GLOBAL_POOLS[config.pool]}
    elif "siglip" in name:  # which has attention pooling
        given |= {"class_token": True, "global_pool": GLOBAL_POOLS["cls"]}
    if config.pool == "gap":
        given["fc_norm"] = False
    return name, given


def _ratio(width: int, mlp_dim: int) -> float:
    """What timm multiplies the width with, and cuts off the fraction, to get `mlp_dim`."""
    ratio = mlp_dim / width
    return ratio if int(width * ratio) == mlp_dim else (mlp_dim + 0.5) / width
