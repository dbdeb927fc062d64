"""A trained model from wherever it lies: a run folder, one of its checkpoints, or a file of weights."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastvit_engine.checkpoint.export import find_checkpoint, kind_of_weights
from fastvit_engine.checkpoint.reader import CheckpointReader
from fastvit_engine.checkpoint.run_config import damaged_config, read_section
from fastvit_engine.checkpoint.store import Checkpoint
from fastvit_engine.config.sections import BEFORE_EVAL_TRANSFORM
from fastvit_engine.engine.protocol import ParameterSlice
from fastvit_engine.errors import UserError
from fastvit_engine.models import VisionTransformer
from fastvit_engine.models.weights.safetensors_file import load_safetensors, model_from_weights
from fastvit_engine.observe.run_folder import RunFolder, run_folder, with_both_slashes
from fastvit_engine.storage.stores import is_store


def load_model(source: str | Path, *, ema: bool = False) -> VisionTransformer:
    """Loads a trained model: float32, on the CPU, in eval mode; `model.config` says what it is.

    source: a run folder (its latest checkpoint), a checkpoint such as RUN/checkpoints/step-N, either also by URL, or a
    `.safetensors` file that `fastvit export` wrote. ema: the moving average of the weights in their place.

    Raises UserError if there is no model, if it is damaged, or if it has no average.

        >>> model = load_model("runs/quickstart")
        >>> logits = model(images)  # uint8 [B, H, W, 3] -> [B, classes]
    """
    text = str(source)
    if text.endswith(".safetensors"):
        if ema:
            raise UserError(f"{text} holds one set of weights: give the file of the average, and leave ema out")
        return load_safetensors(Path(text))
    checkpoint = find_checkpoint(text)
    manifest = checkpoint.read_manifest()
    kind = kind_of_weights(checkpoint, manifest, ema=ema)
    weights = {name: torch.empty(shape) for name, shape in manifest.parameters.items()}
    slices = [ParameterSlice(name, 0, tensor.view(-1)) for name, tensor in weights.items()]
    CheckpointReader(checkpoint, manifest).fill({kind: slices})
    pixels = manifest.state.pixels or _pixels_of_run(text, checkpoint)
    return model_from_weights(manifest.state.fingerprint["model"], pixels, weights, str(checkpoint))


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
