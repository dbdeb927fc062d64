"""Our own files of weights: safetensors with timm's names, and the model's configuration in the metadata.

Metadata, each as JSON: `model`, its configuration; `image_size`; `mean`, `std`, `eval_crop` and `eval_transform`, how
images are prepared, if known; `class_names`, in the order of the outputs, if known; `timm`, Python code that builds a
model of timm for the weights, if there is such a model.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastvit_engine.config.timm_model import PREFIX
from fastvit_engine.errors import UserError
from fastvit_engine.files import atomic_writer
from fastvit_engine.models.weights.described import PIXELS, described
from fastvit_engine.models.weights.position import foreign_positions
from fastvit_engine.models.weights.pretrained import Load, Pretrained, check_readable, model_config
from fastvit_engine.models.weights.timm_code import timm_code
from fastvit_engine.models.weights.timm_names import open_timm_tensors
from fastvit_engine.models.weights.timm_weights import open_tensors, open_timm_file
from fastvit_engine.shown import brief

# As safetensors calls them.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_INTEGERS = ("num_batches_tracked", "relative_position_index")  # how the names of integer buffers of timm end
_DESCRIBED = (*PIXELS, "model", "image_size", "class_names", "timm")


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
    """The metadata of the module's docstring. model: a ModelConfig as JSON. pixels: as in `Pretrained`.

    Raises UserError if this version does not know the model in `where`.
    """
    config = model_config(model, where)
    values: dict[str, Any] = {"model": model, "image_size": config.image_size}
    if foreign_positions(config) is None:
        values["timm"] = timm_code(config)
    values |= pixels or {}
    if class_names is not None:
        values["class_names"] = list(class_names)
    return {"format": "pt", **{key: json.dumps(value) for key, value in values.items()}}


def describe_for_timm(path: Path) -> str:
    """What a file that `model_metadata` describes says of itself: how to prepare images, and how to load it in timm."""
    with safe_open(path, framework="pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items() if key in _DESCRIBED}
    size, pixels = metadata["image_size"], [f"{key} {metadata[key]}" for key in PIXELS if key in metadata]
    names = metadata.get("class_names")
    lines = [
        f"images: {size} x {size} pixels, {', '.join(pixels) or 'mean and std unknown'}",
        f"classes: {'names unknown' if names is None else f'{len(names):,} names'}",
    ]
    if "timm" not in metadata:
        what = foreign_positions(model_config(metadata["model"], str(path)))
        return "\n".join([*lines, f"not in timm, whose models lack {what}: load it with fastvit_engine.load_model"])
    lines += [
        "in timm:",
        *(f"    {line}" for line in metadata["timm"].split("\n")),
        "    from safetensors.torch import load_file",
        f"    model.load_state_dict(load_file({str(path)!r}))",
    ]
    return "\n".join(lines)


def open_safetensors(path: Path, name: str | None = None) -> Pretrained:
    """The model in a file of ours; or in one with timm's names, if `name` says which. Reads the header alone.

    name: a name of the papers, "B/16", or of timm, "vit_base_patch16_224"; "timm/resnet50" for the model of timm
    itself. Raises UserError for any other file.
    """
    where = str(path)
    metadata, shapes, load = read_header(path)
    if "model" not in metadata:
        if name is None:
            raise UserError(
                f"{where} does not say which model its weights are of (no 'model' in its metadata): it is not a file "
                "that `fastvit export` wrote; if its names are those of timm, name the model, as in --name B/16 (from "
                "Python: name=)"
            )
        if name.startswith(PREFIX):
            return open_timm_file(where, name, shapes, load)
        return open_timm_tensors(where, name, shapes, load)
    try:
        model = dict(json.loads(metadata["model"]))
        said = {key: json.loads(metadata[key]) for key in (*PIXELS, "class_names") if key in metadata}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} has damaged metadata ({brief(error)}): export the model again") from error
    pixels, class_names = described(said, where)
    return open_tensors(where, model_config(model, where), shapes, load, pixels, class_names, name=name)


def read_header(path: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]], Load]:
    """Metadata and shapes of a safetensors file, and what reads its tensors as float32, in memory of their own.

    Raises UserError if the file is damaged, or if its tensors are no floating-point numbers; but the counters and
    indexes that models of timm have among their buffers stay the integers that they are.
    """
    check_readable(path)
    try:
        file = safe_open(path, framework="pt")
        metadata = file.metadata() or {}
        names = list(file.keys())
        slices = {name: file.get_slice(name) for name in names}
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        dtypes = {name: part.get_dtype() for name, part in slices.items()}
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a complete safetensors file ({brief(error)}): get it again, or make it again with "
            "`fastvit export RUN --out FILE` or `fastvit convert MODEL FILE --to timm`"
        ) from error
    for name, dtype in dtypes.items():
        is_buffer = name.endswith(_INTEGERS) and dtype in ("I64", "I32")
        if not is_buffer and not (dtype in DTYPES and DTYPES[dtype].is_floating_point):
            raise UserError(f"{path}: tensor '{brief(name)}' holds {dtype}, and weights are floating-point")

    def load(wanted: Sequence[str]) -> dict[str, Tensor]:
        read = ((name, file.get_tensor(name)) for name in wanted)
        return {n: t.to(torch.float32 if t.is_floating_point() else t.dtype, copy=True) for n, t in read}

    return metadata, shapes, load


def write_safetensors(path: Path, model: Pretrained, metadata: Mapping[str, str]) -> None:
    """Writes the parameters under our names, which are timm's, in float32; whole or not at all."""
    tensors = {name: model.read(name).dtype for name in model.buffers}
    integers = {name: "I64" for name, dtype in tensors.items() if not dtype.is_floating_point}
    write_tensors(path, dict(model.shapes), metadata, model.read, integers)


def write_tensors(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    metadata: Mapping[str, str],
    read: Callable[[str], Tensor],
    others: Mapping[str, str] | None = None,
) -> None:
    """Writes float32 tensors, one in memory at a time; whole or not at all. others: dtypes of those that are not."""
    dtypes = {**dict.fromkeys(shapes, "F32"), **(others or {})}
    sizes = {name: math.prod(shape) * DTYPES[dtypes[name]].itemsize for name, shape in shapes.items()}
    with atomic_writer(path) as file:
        file.write(safetensors_header(dtypes, shapes, sizes, metadata))
        for name in sizes:
            file.write(read(name).contiguous().numpy().tobytes())
