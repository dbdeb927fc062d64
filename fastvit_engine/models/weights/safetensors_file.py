"""Our own files of weights: safetensors with timm's names, and the model's configuration in the metadata.

Metadata, each as JSON: `model`, its configuration; `image_size`; `mean`, `std`, `eval_crop` and `eval_transform`, how
images are prepared, if known; `class_names`, in the order of the outputs, if known; `timm`, Python code that builds a
model of timm for the weights.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastvit_engine.config import ModelConfig
from fastvit_engine.config.sections import BEFORE_EVAL_TRANSFORM
from fastvit_engine.errors import UserError
from fastvit_engine.models.vit import VisionTransformer
from fastvit_engine.models.weights.timm_code import timm_code

# As safetensors calls them.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_PIXELS = ("mean", "std", "eval_crop", "eval_transform")
_DESCRIBED = (*_PIXELS, "image_size", "class_names", "timm")
_USUAL = (0.5, 0.5, 0.5)  # mean and std of the recipes


def safetensors_header(
    dtypes: Mapping[str, str],
    shapes: Mapping[str, Sequence[int]],
    sizes: Mapping[str, int],
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """What a safetensors file begins with; the tensors' bytes follow in the order of `sizes`, without gaps."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, size in sizes.items():
        header[name] = {"dtype": dtypes[name], "shape": list(shapes[name]), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text


def model_metadata(
    model: Mapping[str, Any], pixels: Mapping[str, Any] | None, class_names: Sequence[str] | None, where: str
) -> dict[str, str]:
    """The metadata of the module's docstring. model: a ModelConfig as JSON. pixels: as in `model_from_weights`.

    Raises UserError if this version does not know the model in `where`.
    """
    config = model_config(model, where)
    values: dict[str, Any] = {"model": model, "image_size": config.image_size, "timm": timm_code(config)}
    values |= pixels or {}
    if class_names is not None:
        values["class_names"] = list(class_names)
    return {"format": "pt", **{key: json.dumps(value) for key, value in values.items()}}


def describe_for_timm(path: Path) -> str:
    """What a file that `model_metadata` describes says of itself: how to prepare images, and how to load it in timm."""
    with safe_open(path, framework="pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items() if key in _DESCRIBED}
    size, pixels = metadata["image_size"], [f"{key} {metadata[key]}" for key in _PIXELS if key in metadata]
    names = metadata.get("class_names")
    lines = [
        f"images: {size} x {size} pixels, {', '.join(pixels) or 'mean and std unknown'}",
        f"classes: {'names unknown' if names is None else f'{len(names):,} names'}",
        "in timm:",
        *(f"    {line}" for line in metadata["timm"].split("\n")),
        "    from safetensors.torch import load_file",
        f"    model.load_state_dict(load_file({str(path)!r}))",
    ]
    return "\n".join(lines)


def load_safetensors(path: Path) -> VisionTransformer:
    """The model in a file of ours: float32, on the CPU, in eval mode. Raises UserError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a complete safetensors file ({error}): make it again with `fastvit export RUN --out {path}`"
        ) from error
    if "model" not in metadata:
        raise UserError(
            f"{path} does not say which model its weights are of (no 'model' in its metadata): it is not a file that "
            "`fastvit export` wrote"
        )
    try:
        model = dict(json.loads(metadata["model"]))
        pixels = {key: json.loads(metadata[key]) for key in _PIXELS if key in metadata}
        if pixels.keys() & {"mean", "std"} == {"mean"}:
            raise KeyError("std")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} has damaged metadata ({error}): export the model again") from error
    return model_from_weights(model, pixels or None, weights, str(path))


def model_from_weights(
    model: Mapping[str, Any], pixels: Mapping[str, Any] | None, weights: Mapping[str, Tensor], where: str
) -> VisionTransformer:
    """A model of these weights: float32, on the CPU, in eval mode.

    model: a ModelConfig as JSON. pixels: "mean" and "std" of the pixels and, if known, "eval_crop" and
    "eval_transform"; None: those of the recipes are taken, with a warning. where: what the weights are from, for the
    UserError if they do not fit.
    """
    config = model_config(model, where)
    if pixels is None:
        warnings.warn(f"{where} does not say mean and std of its pixels: taking 0.5 and 0.5", stacklevel=2)
        pixels = {"mean": _USUAL, "std": _USUAL}
    built = VisionTransformer(config, mean=tuple(pixels["mean"]), std=tuple(pixels["std"]))
    expected = {name: tensor.shape for name, tensor in built.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            there, here = (list(shapes[name]) if name in shapes else "absent" for shapes in (found, expected))
            raise UserError(
                f"{where}: parameter '{name}' is {there} there and {here} in the model that it says it is of"
            )
    built.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    if "eval_crop" in pixels:
        built.eval_crop = pixels["eval_crop"]
        built.eval_transform = pixels.get("eval_transform", BEFORE_EVAL_TRANSFORM)
    return built.eval()


def model_config(model: Mapping[str, Any], where: str) -> ModelConfig:
    """The section `model` from its JSON. Raises UserError if this version does not know the model in `where`."""
    try:
        return ModelConfig.model_validate(model)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise UserError(
            f"{where} is of a model that this version does not know (model.{key}: {problem['msg']})"
        ) from error
