"""Folders of Hugging Face's transformers: `vit`, `dinov2`, with registers too, as save_pretrained leaves them.

transformers 5 renames parameters in memory (`layers.0.attention.q_proj`); the names on the disk are those of before
(`encoder.layer.0.attention.attention.query`), and they are what is read and written here.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit_engine.config import ModelConfig
from fastvit_engine.config.model_shape import model_of_shape, resolve_shape
from fastvit_engine.errors import UserError
from fastvit_engine.files import atomic_folder, atomic_write
from fastvit_engine.models.weights.described import described
from fastvit_engine.models.weights.entries import Entry, check_shapes, same
from fastvit_engine.models.weights.position import check_positions
from fastvit_engine.models.weights.pretrained import Pretrained, check_readable, from_entries, model_config
from fastvit_engine.models.weights.safetensors_file import read_header, write_tensors
from fastvit_engine.shown import brief

WEIGHTS, CONFIG, PREPROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
_LONGEST = 2**24  # bytes of JSON
_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}  # theirs, ours
_BICUBIC = 3  # as Pillow numbers the ways to resample


class _Kind(NamedTuple):
    """What one of their model types calls the parts of a block, and the defaults of its configuration."""

    defaults: Mapping[str, Any]
    parts: Mapping[str, str]  # ours, theirs
    pixels: tuple[list[float], list[float]]  # mean and std of its image processor


_SHARED = {"attn.proj": "attention.output.dense"}
_DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224}
_KINDS = {
    "vit": _Kind(
        _DEFAULTS | {"intermediate_size": 3072, "patch_size": 16, "layer_norm_eps": 1e-12},
        _SHARED
        | {
            "norm1": "layernorm_before",
            "norm2": "layernorm_after",
            "mlp.fc1": "intermediate.dense",
            "mlp.fc2": "output.dense",
        },
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    ),
    "dinov2": _Kind(
        _DEFAULTS | {"mlp_ratio": 4, "patch_size": 14, "layer_norm_eps": 1e-6},
        _SHARED | {name: name for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")},
        ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ),
}
_KINDS["dinov2_with_registers"] = _KINDS["dinov2"]._replace(
    defaults={**_KINDS["dinov2"].defaults, "patch_size": 16, "num_register_tokens": 4}
)
# Settings under which their code computes what ours does; each is so if it is not given.
_NEEDED: Mapping[str, Any] = {
    "num_channels": 3, "qkv_bias": True, "use_swiglu_ffn": False, "apply_layernorm": True, "pooler_act": "tanh",
}  # fmt: skip


def open_folder(folder: Path, config: Mapping[str, Any], *, head: bool = True) -> Pretrained:
    """The model in a folder. Reads configurations and the header of the weights.

    config: its config.json. head: False leaves the classifier and the pooler out, whatever they are.

    The pooler of a ViTModel is the tanh layer of the official pretraining head: the model has it then, and no head.
    Raises UserError if the folder is not complete, or if its model is not one of ours.
    """
    where, kind = str(folder), str(config.get("model_type"))
    if kind not in _KINDS:
        raise UserError(f"{where} holds a model of type '{brief(kind)}': there are {', '.join(_KINDS)}")
    if not (folder / WEIGHTS).exists():
        raise UserError(
            f"{where} has no {WEIGHTS}: save the model again with transformers, "
            "model.save_pretrained(FOLDER, max_shard_size='1TB')"
        )
    _, shapes, load = read_header(folder / WEIGHTS)
    for key, needed in _NEEDED.items():
        if config.get(key, needed) != needed:
            raise UserError(
                f"{where}: '{key}' is {brief(repr(config[key]))} in {CONFIG}, and only {needed!r} can be read"
            )
    prefix = f"{kind}." if any(name.startswith(f"{kind}.") for name in shapes) else ""
    ignored = {f"{prefix}embeddings.mask_token"}  # of masked training; a model that sees all patches has no use for it
    pooler = f"{prefix}pooler.dense"
    if not head:
        ignored |= {"classifier.weight", "classifier.bias", f"{pooler}.weight", f"{pooler}.bias"}
    shapes = {name: shape for name, shape in shapes.items() if name not in ignored}
    if f"{pooler}.weight" in shapes and "classifier.weight" in shapes:
        raise UserError(
            f"{where} has a pooler ('{pooler}.weight') and a classifier ('classifier.weight'), and the classifier of "
            "transformers does not see the pooler: remove one of them"
        )
    model = _model(config, kind, where) | {
        "num_classes": shapes.get("classifier.weight", (0,))[0],
        "head": "mlp" if f"{pooler}.weight" in shapes else "linear",
    }
    ours = model_config(model, where)
    resolve_shape(ours)
    entries = [*hf_entries(ours, kind, prefix)]
    expected = {theirs: shape for entry in entries for theirs, shape in entry.theirs.items()}
    positions = f"{prefix}embeddings.position_embeddings"
    if ours.registers:  # theirs have a position for the class token
        expected[positions] = (1, expected[positions][1] + 1, *expected[positions][2:])
    if kind != "vit" and ours.num_classes and shapes["classifier.weight"][1:] == (2 * resolve_shape(ours).width,):
        raise UserError(
            f"{where}: tensor 'classifier.weight' is {list(shapes['classifier.weight'])} there and "
            f"{list(expected['classifier.weight'])} in a model of ours, since it also sees the mean of the patches: "
            "leave the head out (--head none, or num_classes=)"
        )
    check_shapes(expected, shapes, where)

    def fetch(name: str) -> Tensor:
        if ours.registers and name == positions:
            return load([name])[name][:, 1:]
        if ours.registers and name == f"{prefix}embeddings.cls_token":  # which is where that position goes
            both = load([name, positions])
            return both[name] + both[positions][:, :1]
        return load([name])[name]

    pixels, _ = described(_pixels(folder, kind), where)
    return from_entries(where, ours, entries, fetch, pixels, _class_names(config, ours.num_classes, where))


def write_folder(model: Pretrained, folder: Path) -> list[str]:
    """Writes what from_pretrained reads, whole or not at all; returns the lines of Python that load it.

    A ViTForImageClassification; without a head, a ViTModel, or with LayerScale a Dinov2Model. Raises UserError, naming
    the parameters, if there is no such model.
    """
    ours, shape = model.config, resolve_shape(model.config)
    kind = "vit" if ours.layer_scale is None else "dinov2"
    _refuse_what_does_not_fit(model, kind)
    prefix = "vit." if ours.num_classes else ""
    name = "Dinov2Model" if kind == "dinov2" else "ViTForImageClassification" if ours.num_classes else "ViTModel"
    theirs: dict[str, Any] = {
        "architectures": [name],
        "model_type": kind,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "hidden_act": next(key for key, value in _ACTIVATIONS.items() if value == ours.activation),
        "layer_norm_eps": ours.layer_norm_eps,
        "image_size": ours.image_size,
        "patch_size": shape.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "torch_dtype": "float32",
    }
    if kind == "vit":
        theirs |= {"intermediate_size": shape.mlp_dim, "encoder_stride": shape.patch_size}
        theirs |= {"pooler_act": "tanh", "pooler_output_size": shape.width}
    else:
        theirs |= {"mlp_ratio": shape.mlp_dim // shape.width, "layerscale_value": 1.0, "use_swiglu_ffn": False}
    if ours.num_classes:
        names = model.output_names or [f"LABEL_{index}" for index in range(ours.num_classes)]
        theirs["id2label"] = {str(index): text for index, text in enumerate(names)}
        theirs["label2id"] = {text: index for index, text in enumerate(names)}
    by_name = {inner: entry for entry in hf_entries(ours, kind, prefix) for inner in entry.theirs}
    shapes = {inner: entry.theirs[inner] for inner, entry in by_name.items()}
    if kind == "dinov2":
        shapes["embeddings.mask_token"] = (1, shape.width)

    made: dict[str, Tensor] = {}  # the rest of the parameter that was read last

    def read(inner: str) -> Tensor:
        if inner not in by_name:
            return torch.zeros(shapes[inner])
        if inner not in made:
            entry = by_name[inner]
            made.update(entry.to_theirs(model.read(entry.ours)))
        return made.pop(inner)

    with atomic_folder(folder) as temporary:
        write_tensors(temporary / WEIGHTS, shapes, {"format": "pt"}, read)
        atomic_write(temporary / CONFIG, _json(theirs))
        atomic_write(temporary / PREPROCESSOR, _json(_preprocessor(model)))
    pooling = ", add_pooling_layer=False" if name == "ViTModel" and ours.head == "linear" else ""
    return [f"from transformers import {name}", f"model = {name}.from_pretrained({str(folder)!r}{pooling})"]


def hf_entries(config: ModelConfig, kind: str, prefix: str) -> Iterator[Entry]:
    """One entry per parameter of the model."""
    shape = resolve_shape(config)
    width, patch, parts = shape.width, shape.patch_size, _KINDS[kind].parts
    embeddings = f"{prefix}embeddings"
    yield same("cls_token", f"{embeddings}.cls_token", 1, 1, width)
    if config.registers:
        yield same("reg_token", f"{embeddings}.register_tokens", 1, config.registers, width)
    yield same("pos_embed", f"{embeddings}.position_embeddings", 1, shape.positions, width)
    projection = f"{embeddings}.patch_embeddings.projection"
    yield same("patch_embed.proj.weight", f"{projection}.weight", width, 3, patch, patch)
    yield same("patch_embed.proj.bias", f"{projection}.bias", width)
    for index in range(shape.depth):
        ours, block = f"blocks.{index}", f"{prefix}encoder.layer.{index}"
        yield from _layer(f"{ours}.norm1", f"{block}.{parts['norm1']}", width)
        for inner, size in (("weight", (width, width)), ("bias", (width,))):
            theirs = {f"{block}.attention.attention.{part}.{inner}": size for part in ("query", "key", "value")}
            yield Entry(f"{ours}.attn.qkv.{inner}", (3 * width, *size[1:]), theirs)
        yield from _layer(f"{ours}.attn.proj", f"{block}.{parts['attn.proj']}", width, width)
        yield from _layer(f"{ours}.norm2", f"{block}.{parts['norm2']}", width)
        yield from _layer(f"{ours}.mlp.fc1", f"{block}.{parts['mlp.fc1']}", shape.mlp_dim, width)
        yield from _layer(f"{ours}.mlp.fc2", f"{block}.{parts['mlp.fc2']}", width, shape.mlp_dim)
        if config.layer_scale is not None:
            yield same(f"{ours}.ls1.gamma", f"{block}.layer_scale1.lambda1", width)
            yield same(f"{ours}.ls2.gamma", f"{block}.layer_scale2.lambda1", width)
    yield from _layer("norm", f"{prefix}layernorm", width)
    if config.head == "mlp":
        yield from _layer("pre_logits.fc", f"{prefix}pooler.dense", width, width)
    if config.num_classes:
        yield from _layer("head", "classifier", config.num_classes, width)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if it is none."""
    check_readable(path)
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read(_LONGEST))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} cannot be read ({brief(error)}): get it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: get it again")
    return content


def _layer(ours: str, theirs: str, outputs: int, inputs: int | None = None) -> Iterator[Entry]:
    """A linear layer, or without `inputs` a LayerNorm."""
    yield same(f"{ours}.weight", f"{theirs}.weight", outputs, *([] if inputs is None else [inputs]))
    yield same(f"{ours}.bias", f"{theirs}.bias", outputs)


def _model(config: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    """The section `model` of their configuration, without what only the weights say."""
    known = {**_KINDS[kind].defaults, **{key: value for key, value in config.items() if value is not None}}
    numbers: dict[str, Any] = {}
    for key, default in _KINDS[kind].defaults.items():
        value = known[key]
        if key in ("image_size", "patch_size") and isinstance(value, list) and len(set(map(str, value))) == 1:
            value = value[0]  # height and width
        if type(value) is not int and not (isinstance(default, float) and isinstance(value, float)):
            raise UserError(
                f"{where}: '{key}' is {brief(repr(value))} in {CONFIG}, and must be a number, the same in both axes"
            )
        numbers[key] = value
    registers = numbers.pop("num_register_tokens", 0)
    if not all(value > 0 for value in numbers.values()) or registers < 0:
        raise UserError(f"{where}: {CONFIG} has a number that is not positive: {brief(numbers)}")
    if (activation := str(known.get("hidden_act", "gelu"))) not in _ACTIVATIONS:
        raise UserError(f"{where} has the activation '{brief(activation)}': there are {', '.join(_ACTIVATIONS)}")
    width = numbers["hidden_size"]
    return model_of_shape(
        patch_size=numbers["patch_size"],
        width=width,
        depth=numbers["num_hidden_layers"],
        heads=numbers["num_attention_heads"],
        mlp_dim=numbers["intermediate_size"] if kind == "vit" else width * numbers["mlp_ratio"],
    ) | {
        "image_size": numbers["image_size"],
        "registers": registers,
        "activation": _ACTIVATIONS[activation],
        "layer_norm_eps": numbers["layer_norm_eps"],
        "layer_scale": None if kind == "vit" else 1.0,
    }


def _class_names(config: Mapping[str, Any], num_classes: int, where: str) -> tuple[str, ...] | None:
    """The names of the classes; None if there are none but LABEL_0 and its like."""
    names = config.get("id2label")
    if not num_classes or not isinstance(names, dict):
        return None
    found = tuple(str(names.get(str(index))) for index in range(len(names)))
    if len(found) != num_classes or any(str(index) not in names for index in range(num_classes)):
        raise UserError(
            f"{where}: tensor 'classifier.weight' has {num_classes:,} classes, and 'id2label' in {CONFIG} names "
            f"{len(found):,}"
        )
    return None if found == tuple(f"LABEL_{index}" for index in range(num_classes)) else found


def _pixels(folder: Path, kind: str) -> dict[str, Any]:
    """How their image processor prepares images, as far as section `data` can say it."""
    mean, std = _KINDS[kind].pixels
    if not (folder / PREPROCESSOR).exists():
        text = f"{folder} has no {PREPROCESSOR}: taking mean {mean} and std {std}, the defaults of its model type"
        warnings.warn(text, stacklevel=4)
        return {"mean": mean, "std": std}
    theirs = read_json(folder / PREPROCESSOR)
    factor = theirs.get("rescale_factor", 1 / 255)
    if not theirs.get("do_rescale", True) or not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-3:
        raise UserError(f"{folder / PREPROCESSOR} does not divide pixels by 255, which this version needs")
    said: dict[str, Any] = {"mean": theirs.get("image_mean", mean), "std": theirs.get("image_std", std)}
    if not theirs.get("do_normalize", True):
        said = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    size, crop = theirs.get("size"), theirs.get("crop_size")
    edge = size.get("shortest_edge") if isinstance(size, dict) else None
    side = crop.get("height") if isinstance(crop, dict) else crop
    if theirs.get("do_center_crop") and type(edge) is int and type(side) is int and 0 < side <= edge:
        said["eval_crop"] = side / edge
        said["eval_transform"] = "timm" if theirs.get("resample") == _BICUBIC else "fast"
    return said


def _preprocessor(model: Pretrained) -> dict[str, Any]:
    """Their image processor that resizes and crops as the evaluation of the model does."""
    pixels, size = model.pixels or {}, model.config.image_size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(size / (pixels.get("eval_crop") or 0.875))},
        "resample": 2 if pixels.get("eval_transform") == "fast" else _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pixels.get("mean", [0.5] * 3)),
        "image_std": list(pixels.get("std", [0.5] * 3)),
    }


def _refuse_what_does_not_fit(model: Pretrained, kind: str) -> None:
    config, shape = model.config, resolve_shape(model.config)
    if shape.resnet is not None:
        name = next(name for name in model.shapes if "conv" in name)
        raise UserError(
            f"{model.where} has the convolutions of a ResNet ('{name}' and its like), which the models of transformers "
            "lack that this version writes: write --to timm, or --to npz"
        )
    check_positions(config, model.where, "a folder of transformers")
    if config.registers:
        raise UserError(
            f"{model.where} has register tokens ('reg_token'), which the models of transformers lack that this version "
            "writes: write --to timm"
        )
    if config.pool == "map":
        raise UserError(
            f"{model.where} has attention pooling ('attn_pool.latent' and its like), which the models of transformers "
            "lack that this version writes: write --to timm, or --to npz"
        )
    if config.pool != "cls":
        raise UserError(
            f"{model.where} has no class token ('cls_token'), which the models of transformers have: write --to timm"
        )
    if kind == "dinov2" and (config.num_classes or config.head == "mlp"):
        raise UserError(
            f"{model.where} has LayerScale ('blocks.0.ls1.gamma' and its like), which ViTForImageClassification lacks: "
            "--head none writes a Dinov2Model, --to timm keeps the head"
        )
    if kind == "dinov2" and shape.mlp_dim % shape.width:
        raise UserError(
            f"{model.where}: parameter 'blocks.0.mlp.fc1.weight' is [{shape.mlp_dim}, {shape.width}], and a "
            "Dinov2Model has a hidden width that is a multiple of the width"
        )
    if config.head == "mlp" and config.num_classes:
        raise UserError(
            f"{model.where} has a tanh layer ('pre_logits.fc.weight') before its head, which ViTForImageClassification "
            "lacks: --head none leaves both out, --to npz keeps both"
        )


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
