"""Writes a model in the layout of another program."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from fastvit_engine.config.model_shape import resolve_shape
from fastvit_engine.config.timm_model import is_timm
from fastvit_engine.errors import UserError
from fastvit_engine.models.weights.huggingface import write_folder
from fastvit_engine.models.weights.npz import write_npz
from fastvit_engine.models.weights.pretrained import Pretrained
from fastvit_engine.models.weights.timm_files import write_hub_folder, write_timm

Target = Literal["npz", "timm", "hf", "hub-folder"]


# What users of a hybrid in timm should know.
OTHER_NUMBERS = (
    "timm adds other small numbers when it standardises the convolutions of a hybrid: outputs differ a little"
)


class Written(NamedTuple):
    """What the user should know: sentences, and lines of Python that load what was written."""

    notes: list[str]
    code: list[str]


def convert(model: Pretrained, destination: Path, target: Target) -> Written:
    """Writes a model, whole or not at all, to a file (npz, timm) or a new folder (hf, hub-folder).

    Raises UserError, naming the parameters, if the target has no room for them; and if the destination cannot be
    written.
    """
    suffix = {"npz": ".npz", "timm": ".safetensors"}.get(target)
    if suffix is not None and destination.suffix != suffix:
        raise UserError(f"{destination} must end in {suffix}, by which programs tell what it is")
    if suffix is not None and destination.is_dir():
        raise UserError(f"{destination} is a folder, and --to {target} writes a file: name a file in it")
    if suffix is None and (destination.exists() or destination.is_symlink()) and not _is_empty_folder(destination):
        raise UserError(f"{destination} exists, and --to {target} writes a new folder: name another one")
    if not destination.absolute().parent.is_dir():
        raise UserError(f"{destination.absolute().parent} is no folder: make it first")
    if is_timm(model.config) and target != "timm":
        raise UserError(
            f"{model.where} is {model.config.name}, and --to {target} is for this engine's Vision Transformers: "
            "write --to timm"
        )
    if target == "npz":
        code = ["from fastvit_engine import load_model", f"model = load_model({str(destination)!r})"]
        return Written(write_npz(model, destination), code)
    write: Callable[[Pretrained, Path], list[str]]
    write = {"timm": write_timm, "hf": write_folder, "hub-folder": write_hub_folder}[target]
    notes = [] if model.pixels else ["mean and std of the pixels are unknown: 0.5 and 0.5 are written"]
    if not is_timm(model.config) and resolve_shape(model.config).is_hybrid:
        notes.append(OTHER_NUMBERS)
    outputs, named = model.config.num_classes, len(model.class_names or ())
    if outputs and named and named != outputs:
        rest = f"output n is called LABEL_n from n = {named} on" if named < outputs else "the last ones are left out"
        notes.append(f"the model has {outputs:,} outputs and the names of {named:,} classes: {rest}")
    return Written(notes, write(model, destination))


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
