"""A model from wherever it lies: a run folder, one of its checkpoints, or weights in any layout that is read."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvit_engine.checkpoint.export import find_checkpoint, kind_of_weights
from fastvit_engine.checkpoint.reader import CheckpointReader
from fastvit_engine.checkpoint.run_config import damaged_config, read_section
from fastvit_engine.checkpoint.store import Checkpoint
from fastvit_engine.config.sections import BEFORE_EVAL_TRANSFORM
from fastvit_engine.config.timm_model import is_timm
from fastvit_engine.engine.protocol import ParameterSlice
from fastvit_engine.errors import UserError
from fastvit_engine.models import AnyModel
from fastvit_engine.models.timm_library import insist_on_import
from fastvit_engine.models.weights.huggingface import CONFIG, open_folder, read_json
from fastvit_engine.models.weights.npz import open_npz
from fastvit_engine.models.weights.position import Interpolation
from fastvit_engine.models.weights.pretrained import Pretrained, model_config
from fastvit_engine.models.weights.safetensors_file import open_safetensors
from fastvit_engine.models.weights.timm_files import open_timm_folder
from fastvit_engine.models.weights.timm_weights import open_tensors, state_of
from fastvit_engine.observe.run_folder import RunFolder, run_folder, with_both_slashes
from fastvit_engine.storage.stores import is_store


def load_model(
    source: str | Path,
    image_size: int | None = None,
    num_classes: int | None = None,
    interpolation: Interpolation = "bilinear",
    *,
    ema: bool = False,
    name: str | None = None,
) -> AnyModel:
    """Loads a model: float32, on the CPU, in eval mode; `model.config` says what it is.

    source: a run folder (its latest checkpoint), a checkpoint such as RUN/checkpoints/step-N, either also by URL; a
    `.safetensors` file of `fastvit export` or `fastvit convert`, or with timm's names and `name`; an official `.npz`; a
    folder of Hugging Face's transformers (`vit`, `dinov2`) or of timm, with config.json and model.safetensors.
    image_size: for images of another size, with the position table resampled: "bilinear" with corners aligned, as in
    the authors' code, or "bicubic", as in DINOv2. num_classes: a new head of zeros, in the place of head and tanh
    layer; 0: no head. ema: the moving average of the weights of a run. name: "B/16" or "vit_base_patch16_224", for
    weights that do not say it; "timm/resnet50", for a file of timm's, gives timm's own model; "timm/MODULE:NAME" allows
    to import a module that the weights name.

    Raises UserError if there is no model, if it is damaged, if it is none of ours, or if it has no average.

        >>> model = load_model("runs/quickstart")
        >>> logits = model(images)  # uint8 [B, H, W, 3] -> [B, classes]
        >>> model = load_model("ViT-B_16.npz", image_size=384, num_classes=10)
    """
    if interpolation not in ("bilinear", "bicubic"):
        raise UserError(f"interpolation is '{interpolation}': there are bilinear and bicubic")
    model = open_model(source, ema=ema, name=name, head=num_classes is None)
    return model.changed(image_size=image_size, num_classes=num_classes, interpolation=interpolation).build()


def open_model(source: str | Path, *, ema: bool = False, name: str | None = None, head: bool = True) -> Pretrained:
    """Finds a model and reads what it is; its parameters are read when they are asked for. See `load_model`.

    head: False if head and tanh layer will not be used, so that they may be what no model of ours has.
    """
    text = str(source)
    path = Path(text)
    of_file = text.endswith((".safetensors", ".npz"))
    of_folder = not is_store(text) and "://" not in text and os.path.isfile(path / CONFIG)
    if ema and (of_file or of_folder):
        raise UserError(f"{text} holds one set of weights: give the file of the average, and leave ema out")
    if of_file and "://" in text:
        raise UserError(f"{text} is on a server: download the file, and give its path")
    if text.endswith(".safetensors"):
        return open_safetensors(path, name)
    if name is not None and (text.endswith(".npz") or of_folder):
        raise UserError(f"{text} says itself which model it is of: leave the name '{name}' out")
    if text.endswith(".npz"):
        return open_npz(path)
    if of_folder:
        config = read_json(path / CONFIG)
        return open_timm_folder(path, config) if "architecture" in config else open_folder(path, config, head=head)
    if "://" not in text and os.path.isfile(path):
        raise UserError(
            f"{text} is a file, and no .npz or .safetensors: give one of those, a run folder, a checkpoint, or a "
            f"folder with {CONFIG}"
        )
    try:
        return _open_checkpoint(text, ema=ema, name=name)
    except PermissionError as error:
        raise UserError(f"{error.filename or text} cannot be read ({error.strerror}): make it readable") from error


def _open_checkpoint(source: str, *, ema: bool, name: str | None) -> Pretrained:
    checkpoint = find_checkpoint(source)
    manifest = checkpoint.read_manifest()
    kind, state, where = kind_of_weights(checkpoint, manifest, ema=ema), manifest.state, str(checkpoint)
    config = model_config(state.fingerprint["model"], where)
    shapes = {name: tuple(shape) for name, shape in manifest.of_model.items()}
    dtypes: dict[str, torch.dtype] = {}
    if is_timm(config):
        insist_on_import(config.name, where, name)
        state_dict, stored = state_of(config), manifest.stored("buffer")
        shapes |= {name: state_dict.shapes[name] for name in state_dict.buffers if name in stored}
        dtypes = {name: state_dict.dtypes[name] for name in state_dict.buffers}
    reader, kinds = CheckpointReader(checkpoint, manifest), manifest.kind_of_each(shapes, kind)

    def load(names: Sequence[str]) -> dict[str, Tensor]:
        weights = {name: torch.empty(shapes[name], dtype=dtypes.get(name, torch.float32)) for name in names}
        wanted: dict[str, list[ParameterSlice]] = {}
        for name, tensor in weights.items():
            wanted.setdefault(kinds[name], []).append(ParameterSlice(name, 0, tensor.view(-1)))
        reader.fill(wanted)
        return weights

    pixels = state.pixels or _pixels_of_run(source, checkpoint)
    names = None if state.class_names is None else tuple(state.class_names)
    return open_tensors(where, config, shapes, load, pixels, names, name=name)


def _pixels_of_run(source: str, checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """How the run prepares images, as its folder has it; for checkpoints of versions that do not say it."""
    for folder in (with_both_slashes(source).rstrip("/"), re.sub(r"/+[^/]+/+[^/]+/*$", "", str(checkpoint))):
        if "://" in folder and not is_store(folder):
            continue
        run = run_folder(folder) if is_store(folder) else RunFolder(Path(folder))
        if (data := read_section(run, "data")) is not None:
            try:
                transform = data.get("eval_transform", BEFORE_EVAL_TRANSFORM)
                return {key: data[key] for key in ("mean", "std", "eval_crop")} | {"eval_transform": transform}
            except KeyError as error:
                raise damaged_config(run) from error
    return None
