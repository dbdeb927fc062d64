"""Weights for timm: one file, or the folder of a model page, with a model card."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvit_engine.config.model_shape import model_title, resolve_shape
from fastvit_engine.config.timm_model import is_timm
from fastvit_engine.errors import UserError
from fastvit_engine.files import atomic_folder, atomic_write
from fastvit_engine.models.weights.described import described
from fastvit_engine.models.weights.huggingface import CONFIG, WEIGHTS
from fastvit_engine.models.weights.position import check_positions
from fastvit_engine.models.weights.pretrained import USUAL, Pretrained
from fastvit_engine.models.weights.safetensors_file import (
    model_metadata,
    open_safetensors,
    read_header,
    write_safetensors,
)
from fastvit_engine.models.weights.timm_code import GLOBAL_POOLS, TIMM_EPS, timm_arguments, timm_code
from fastvit_engine.models.weights.timm_names import open_timm_tensors
from fastvit_engine.models.weights.timm_resnets import bit_architecture

_INTERPOLATIONS = {"fast": "bilinear"}  # of data.eval_transform; others are timm's own, or the nearest that it has
_TRANSFORMS = {"bicubic": "timm", "bilinear": "fast"}
_POOLS = {"cls": "class token", "gap": "mean of the patches", "map": "attention pooling of the patches"}
_MOST_NAMES = 20  # that fit a line


def write_timm(model: Pretrained, path: Path) -> list[str]:
    """Writes one safetensors file under timm's names; returns the lines of Python that load it, strictly.

    Its metadata holds timm's pretrained_cfg too. Raises UserError, naming them, if timm has no room for parameters.
    """
    _refuse_what_does_not_fit(model)
    cfg = pretrained_cfg(model)
    write_safetensors(path, model, {**_metadata(model), "pretrained_cfg": json.dumps(cfg)})
    if len(model.class_names or ()) > _MOST_NAMES:
        cfg.pop("label_names")
    if not is_timm(model.config) and not resolve_shape(model.config).is_transformer:
        load = ["from safetensors.torch import load_file", f"model.load_state_dict(load_file({str(path)!r}))"]
        return [*timm_code(model.config).split("\n"), *load]
    code = timm_code(model.config, checkpoint_path=str(path), pretrained_cfg_overlay=cfg)
    return code.split("\n")


def write_hub_folder(model: Pretrained, folder: Path) -> list[str]:
    """Writes a folder to upload as a model page; returns the lines of Python that load it, strictly.

    Raises UserError, naming them, if timm has no room for parameters, or its configuration for a setting.
    """
    _refuse_what_does_not_fit(model)
    if model.config.layer_norm_eps != TIMM_EPS:
        raise UserError(
            f"{model.where} has model.layer_norm_eps {model.config.layer_norm_eps:g}, for which timm's configuration "
            "has no room: write --to timm, or --to hf"
        )
    shape, arguments = resolve_shape(model.config), dict[str, Any]()
    if shape.is_transformer:
        architecture, arguments = timm_arguments(model.config)
    elif (named := bit_architecture(model.config)) is not None:
        architecture = named
    else:
        raise UserError(
            f"{model.where} is a {model.config.name}, for which timm has no architecture of this name: write --to timm"
        )
    content = {
        "architecture": architecture,
        "num_classes": model.config.num_classes,
        "num_features": shape.width,
        "global_pool": GLOBAL_POOLS[model.config.pool] if shape.is_transformer else "avg",
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
        "pretrained_cfg": pretrained_cfg(model),
    }
    with atomic_folder(folder) as temporary:
        write_safetensors(temporary / WEIGHTS, model, _metadata(model))
        atomic_write(temporary / CONFIG, json.dumps(content, indent=2) + "\n")
        atomic_write(temporary / "README.md", model_card(model, folder.name))
    return ["import timm", f"model = timm.create_model({f'local-dir:{folder}'!r}, pretrained=True)"]


def pretrained_cfg(model: Pretrained) -> dict[str, Any]:
    """How images are prepared, and the names of the classes, as timm's pretrained_cfg has it."""
    pixels, size = model.pixels or {}, model.config.image_size
    cfg: dict[str, Any] = {
        "input_size": [3, size, size],
        "mean": list(pixels.get("mean", USUAL)),
        "std": list(pixels.get("std", USUAL)),
        "interpolation": _INTERPOLATIONS.get(pixels.get("eval_transform") or "timm", "bicubic"),
        "crop_pct": pixels.get("eval_crop") or 0.875,
        "num_classes": model.config.num_classes,
    }
    if model.output_names is not None:
        cfg["label_names"] = model.output_names
    return cfg


def open_timm_folder(folder: Path, config: Mapping[str, Any]) -> Pretrained:
    """The model in a folder as timm's model pages have it. config: its config.json.

    Raises UserError if the folder is not complete, or if its model is not one of ours.
    """
    where, path = str(folder), folder / WEIGHTS
    if not path.exists():
        raise UserError(f"{where} has no {WEIGHTS}: download it from the model page")
    metadata, shapes, load = read_header(path)
    if "model" in metadata:
        return open_safetensors(path)
    cfg, arguments = config.get("pretrained_cfg"), config.get("model_args") or {}
    if not isinstance(cfg, dict) or not isinstance(arguments, dict):
        raise UserError(f"{folder / CONFIG} has no pretrained_cfg and model_args of timm: get it again")
    said = {key: cfg[key] for key in ("mean", "std") if key in cfg}
    said["class_names"] = config.get("label_names") or cfg.get("label_names")
    if cfg.get("interpolation") in _TRANSFORMS and isinstance(cfg.get("crop_pct"), int | float):
        said |= {"eval_crop": cfg["crop_pct"], "eval_transform": _TRANSFORMS[cfg["interpolation"]]}
    pixels, names = described(said, where)
    arguments = {key: config[key] for key in ("global_pool",) if key in config} | arguments
    size = cfg.get("input_size")
    return open_timm_tensors(
        where,
        str(config["architecture"]),
        shapes,
        load,
        arguments=arguments,
        pixels=pixels,
        class_names=names,
        image_size=size[-1] if isinstance(size, list) and size and isinstance(size[-1], int) else None,
    )


def model_card(model: Pretrained, name: str) -> str:
    """The README.md of a model page, with the metadata that its site reads."""
    config, shape, cfg = model.config, resolve_shape(model.config), pretrained_cfg(model)
    task = "image-classification" if config.num_classes else "image-feature-extraction"
    title = f"ViT-{model_title(config)}" if shape.is_transformer else config.name
    kind = "ResNet" if not shape.is_transformer else "hybrid" if shape.is_hybrid else "Vision Transformer"
    parameters = sum(math.prod(size) for size in model.shapes.values())
    classes = f"{config.num_classes:,}" if config.num_classes else "none: the model gives representations"
    if model.class_names is not None:
        shown = ", ".join(text.replace("\n", " ") for text in model.class_names[:_MOST_NAMES])
        classes += f" ({shown}{', ...' if len(model.class_names) > _MOST_NAMES else ''})"
    unknown = "" if model.pixels else " (assumed: the source of the weights does not say it)"
    patches = f", {shape.patches} patches of {shape.patch_size}" if shape.is_transformer else ""
    rows = {
        "model": title,
        "parameters": f"{parameters:,}",
        "images": f"{config.image_size} x {config.image_size} pixels{patches}",
        "pixels": f"in [0, 1], minus {cfg['mean']}, divided by {cfg['std']}{unknown}",
        "resizing": f"short side to image size / {cfg['crop_pct']:g}, {cfg['interpolation']}, then the centre crop",
        "pooling": _POOLS[config.pool],
        "registers": f"{config.registers}",
        "activation": config.activation,
        "classes": classes,
    }
    if not shape.is_transformer:
        rows = {key: text for key, text in rows.items() if key not in ("pooling", "registers", "activation")}
    table = "\n".join(f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in rows.items())
    return f"""\
---
library_name: timm
pipeline_tag: {task}
tags:
- {task}
- timm
- {"vision-transformer" if shape.is_transformer else "resnet"}
---
# {name}

A {kind} ({title}), converted by FastViT Engine.

| | |
|---|---|
{table}

## Use

```python
import timm

model = timm.create_model("hf-hub:USER/{name}", pretrained=True).eval()  # or "local-dir:PATH" for a folder on a disk
transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))
```

## To be completed

The license of the weights, the data that they were trained on, and how well they do.
"""


def _metadata(model: Pretrained) -> dict[str, str]:
    return model_metadata(model.config.model_dump(mode="json"), model.pixels, model.class_names, model.where)


def _refuse_what_does_not_fit(model: Pretrained) -> None:
    check_positions(model.config, model.where, "timm's Vision Transformer", needs_table=False)
    if model.config.head == "mlp":
        raise UserError(
            f"{model.where} has a tanh layer ('pre_logits.fc.weight'), which timm's models lack: --head none leaves it "
            "and the head out, --to npz keeps both"
        )
