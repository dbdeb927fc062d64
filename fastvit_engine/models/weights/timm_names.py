"""Weights of timm's Vision Transformers, whose names are ours: which model they are of, and what timm's cfg says."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fastvit_engine.config.model_shape import SIZES, ModelSize, model_of_shape, resolve_shape, smallest_image
from fastvit_engine.config.resnet_shape import hybrid_name
from fastvit_engine.errors import UserError
from fastvit_engine.models.weights.position import grid_side
from fastvit_engine.models.weights.pretrained import Pretrained, from_tensors, model_config
from fastvit_engine.models.weights.timm_code import ARCHITECTURES, GLOBAL_POOLS
from fastvit_engine.models.weights.timm_resnets import bit_of, hybrid_named
from fastvit_engine.shown import brief

_SIZES = {architecture.split("_")[1]: SIZES[size] for size, (architecture, _) in ARCHITECTURES.items()}
_SIZES["giantopt"] = ModelSize(1536, 40, 16, 6144)  # of SigLIP alone
# Names whose model has nothing but what the weights show, or the name of SigLIP; of others, the name says more.
_PLAIN = re.compile(r"vit_([a-z0-9]+)_patch(\d+)(?:_reg\d+)?(_siglip)?(_gap)?(?:_\d+|_dinov2)?(?:\.\S*)?")
_SIGLIP_WITH_TANH = re.compile(r"vit_(base_patch32_|large_patch16_siglip(_gap)?_512|so400m_patch16_|giantopt_)")
_ACTIVATIONS = ("gelu", "gelu_tanh")
# Arguments of timm's models that we know; img_size is seen in the weights, if there is a position table.
_KNOWN = {"img_size", "num_classes", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "init_values",
          "act_layer", "class_token", "global_pool", "fc_norm", "drop_rate", "drop_path_rate", "reg_tokens",
          "no_embed_class", "pos_embed"}  # fmt: skip

Load = Callable[[Sequence[str]], dict[str, Tensor]]


def open_timm_tensors(
    where: str,
    name: str,
    shapes: Mapping[str, Sequence[int]],
    load: Load,
    *,
    arguments: Mapping[str, Any] | None = None,
    pixels: Mapping[str, Any] | None = None,
    class_names: tuple[str, ...] | None = None,
    image_size: int | None = None,
) -> Pretrained:
    """The model of these weights.

    name: of the papers or of timm; it says what the weights do not show, the number of heads. arguments: those of
    timm's `create_model` beside it. image_size: of a ResNet, whose weights do not show it. Raises UserError if the
    weights are not of that model.
    """
    if (resnet := bit_of(name, shapes, image_size)) is not None:
        return from_tensors(where, model_config(resnet, where), shapes, load, pixels, class_names)
    arguments = arguments or {}
    if unknown := [key for key in arguments if key not in _KNOWN]:
        raise UserError(f"{where}: model_args has '{brief(unknown[0])}', which this version does not know")
    model = _numbers(name, arguments, where)
    pool = "map" if "attn_pool.latent" in shapes else "cls" if "cls_token" in shapes else "gap"
    activation = arguments.get("act_layer", "gelu")
    if (match := _PLAIN.fullmatch(name)) and match[3]:
        arguments = {"global_pool": "avg" if match[4] else "map"} | dict(arguments)
        activation = arguments.get("act_layer", "gelu_tanh" if _SIGLIP_WITH_TANH.match(name) else "gelu")
    if arguments.get("global_pool", GLOBAL_POOLS[pool]) not in (GLOBAL_POOLS[pool], ""):
        raise UserError(
            f"{where} is said to pool '{brief(arguments['global_pool'])}', and has the parameters of "
            f"'{GLOBAL_POOLS[pool]}': 'cls_token' is of 'token', 'attn_pool.latent' of 'map', neither of 'avg'"
        )
    if activation not in _ACTIVATIONS:
        raise UserError(f"{where} has the activation '{brief(activation)}': there are {' and '.join(_ACTIVATIONS)}")
    registers = shapes["reg_token"][1] if len(shapes.get("reg_token", ())) == 3 else 0
    if registers and not arguments.get("no_embed_class", not arguments or "_reg" in name):
        raise UserError(f"{where} has register tokens with a position (no no_embed_class), and ours have none")
    if (positions := arguments.get("pos_embed", "learn")) not in ("learn", "none", ""):
        raise UserError(f"{where}: model_args has pos_embed '{brief(positions)}': there are learn and none")
    patch_size, has_table = smallest_image(model["name"]), positions == "learn"
    table = shapes.get("pos_embed", ())
    if has_table and len(table) != 3:
        raise UserError(f"{where}: parameter 'pos_embed' is {[*table] or 'absent'} there, and must be [1, N, D]")
    if has_table:
        side = grid_side(table[1], int(pool == "cls" and not registers), f"{where}: parameter 'pos_embed'")
    head = shapes.get("head.weight", (0,))
    model |= {
        "image_size": side * patch_size if has_table else arguments.get("img_size", 224),
        "pos_embed": "learned" if has_table else "none",
        "num_classes": head[0] if head else 0,
        "pool": pool,
        "registers": registers,
        "head": "mlp" if "pre_logits.fc.weight" in shapes else "linear",
        "activation": activation,
        "layer_scale": _layer_scale(arguments, shapes),
    }
    config = model_config(model, where)
    resolve_shape(config)
    return from_tensors(where, config, shapes, load, pixels, class_names)


def _numbers(name: str, arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`name` of a section `model`, and the numbers that differ from it."""
    if match := re.fullmatch(r"(?:ViT-)?(\w+)/(\d{1,5})", name):
        if match[1] in SIZES:
            return {"name": f"{match[1]}/{int(match[2])}"}
    elif (hybrid := hybrid_named(name)) is not None and hybrid[1] in SIZES:
        numbers = _changed(SIZES[hybrid[1]], 1, arguments, where)
        return numbers | {"name": hybrid_name(hybrid[0], numbers["name"].partition("/")[0])}
    elif (match := _PLAIN.fullmatch(name)) and match[1] in _SIZES:
        return _changed(_SIZES[match[1]], match[2], arguments, where)
    known = ", ".join(f"vit_{size}_patch16_224" for size in ("tiny", "base"))
    raise UserError(
        f"'{brief(name)}' names no model that this version knows: give a size and a patch size, as in B/16 "
        f"(sizes: {', '.join(SIZES)}), a hybrid or ResNet, as R50+B/16 or R50x1, or a plain Vision Transformer of "
        f"timm, as {known}"
    )


def _changed(size: ModelSize, patch_size: Any, arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`name` of a section `model`, and the numbers that differ from it. arguments: of timm, where not as in `size`."""
    try:
        width = int(arguments.get("embed_dim", size.width))
        ratio = float(arguments.get("mlp_ratio", size.mlp_dim / size.width))
        return model_of_shape(
            patch_size=int(arguments.get("patch_size", patch_size)),
            width=width,
            depth=int(arguments.get("depth", size.depth)),
            heads=int(arguments.get("num_heads", size.heads)),
            mlp_dim=int(width * ratio),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: model_args makes no model ({brief(error)})") from error


def _layer_scale(arguments: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> float | None:
    """Its initial value, which matters no more; None if the weights have none."""
    if "blocks.0.ls1.gamma" not in shapes:
        return None
    value = arguments.get("init_values")
    return float(value) if isinstance(value, int | float) and 0 <= value <= 10 else 1.0
