"""Official `.npz` files: those of vision_transformer (with AugReg and hybrids), of big_vision and of BiT.

Names and shapes say the model. What they do not say is the convention of that code: the tanh approximation of GELU,
LayerNorm with eps 1e-6, and pixels in [-1, 1]. The comment of the zip archive, which other readers pass over, says what
differs in a file that we write, and the class names.
"""

import contextlib
import json
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from fastvit_engine.config import ModelConfig
from fastvit_engine.config.model_shape import Shape, model_of_shape, resolve_shape
from fastvit_engine.config.resnet_shape import ResNetShape, hybrid_name, hybrid_of
from fastvit_engine.errors import UserError
from fastvit_engine.files import atomic_writer
from fastvit_engine.models.weights.described import described
from fastvit_engine.models.weights.entries import Dimensions, Entry, check_shapes, same
from fastvit_engine.models.weights.position import check_positions, grid_side
from fastvit_engine.models.weights.pretrained import USUAL, Pretrained, check_readable, from_entries, model_config
from fastvit_engine.models.weights.resnet_npz import (
    bit_config,
    bit_entries,
    hybrid_entries,
    hybrid_resnet,
    is_bit,
    plain_names,
)
from fastvit_engine.models.weights.timm_resnets import IMAGE_SIZE
from fastvit_engine.shown import brief

_OF_TRAINING = ("opt/", "extra/", "chrono/", "states/", "step")
# Prefixes of the weights, and of what is beside them: in the last, the text model that images were trained with.
_PREFIXES = {"opt/target/": _OF_TRAINING, "params/": _OF_TRAINING, "params/img/": (*_OF_TRAINING, "params/")}
_CONVENTION: dict[str, Any] = {"activation": "gelu_tanh", "layer_norm_eps": 1e-6}
_PIXELS: dict[str, Any] = {"mean": [*USUAL], "std": [*USUAL]}
_BLOCK = re.compile(r"Transformer/encoderblock_(\d{1,9})/(.+)")
_STACKED = "Transformer/encoderblock/"
_MOST_ARRAYS = 200_000
_SPARE, _MOST_COMPRESSED = 2**28, 50  # bytes, and bytes of arrays per byte of the file: weights hardly compress
_LONGEST_COMMENT = 65_535  # bytes, as zip has it
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    OSError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    OverflowError,
    TypeError,
    RuntimeError,
    NotImplementedError,
    SyntaxError,
    RecursionError,
    MemoryError,
)  # fmt: skip - what zipfile and numpy raise for damaged, encrypted and unknown archives


class _Layout(NamedTuple):
    """What differs between the two programs: parts of a block, and the position table."""

    attention: str
    norm2: str
    mlp: str
    positions: str


_OFFICIAL = _Layout(
    "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3", "Transformer/posembed_input/pos_embedding"
)
_BIG_VISION = _Layout("MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0", "pos_embedding")
_POOL = "MAPHead_0"


class _Array(NamedTuple):
    member: zipfile.ZipInfo
    shape: Dimensions
    dtype: np.dtype[Any]
    fortran: bool


def open_npz(path: Path) -> Pretrained:
    """The model in an official file. Reads names and shapes; arrays are read when they are asked for.

    Raises UserError if the file is damaged, holds pickled objects, or is of no model of ours.
    """
    check_readable(path)
    with _readable(path):
        archive = zipfile.ZipFile(path)
        arrays = _without_prefix({array.member.filename[:-4]: array for array in _arrays(archive, path)})
        said = _said(archive.comment)
    where = str(path)
    names: _Names | _BitNames = _BitNames(arrays, where) if is_bit(plain_names(arrays)) else _Names(arrays, where)
    config = names.config(said)
    entries = [*names.entries(config)]
    expected = {theirs: shape for entry in entries for theirs, shape in entry.theirs.items()}
    check_shapes(expected, names.shapes, where, "array")
    stacked: dict[str, Tensor] = {}

    def fetch(theirs: str) -> Tensor:
        name, layer = names.stored(theirs)
        with _readable(path):
            if layer is None:
                return _read(archive, arrays[name])
            if name not in stacked:
                stacked[name] = _read(archive, arrays[name])
            return stacked[name][layer]

    pixels, class_names = described(said, where)
    return from_entries(where, config, entries, fetch, pixels or _PIXELS, class_names, what="array")


def write_npz(model: Pretrained, path: Path) -> list[str]:
    """Writes an official file, per block, whole or not at all; returns what readers of it should know, in sentences.

    Raises UserError, naming the parameters, if the official layout has no room for them.
    """
    check_positions(model.config, model.where, "an official .npz")
    if model.config.registers:
        raise UserError(
            f"{model.where} has register tokens ('reg_token'), for which an official .npz has no array: write --to timm"
        )
    if model.config.layer_scale is not None:
        raise UserError(
            f"{model.where} has LayerScale ('blocks.0.ls1.gamma' and its like), for which an official .npz has no "
            "arrays: write --to timm"
        )
    said, notes = _differences(model)
    with atomic_writer(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for entry in _entries_to_write(model.config):
            for name, tensor in entry.to_theirs(model.read(entry.ours)).items():
                member = zipfile.ZipInfo(f"{name}.npy")  # without the time, so that equal weights are equal files
                with archive.open(member, "w", force_zip64=True) as out:
                    npy.write_array(out, tensor.numpy(), allow_pickle=False)
        archive.comment = _comment(said) if said else b""
    return notes


def _entries_to_write(config: ModelConfig) -> Iterator[Entry]:
    if not resolve_shape(config).is_transformer:
        return bit_entries(config)
    # the first of the two programs has no attention pooling
    return npz_entries(config, _BIG_VISION if config.pool == "map" else _OFFICIAL)


def _differences(model: Pretrained) -> tuple[dict[str, Any], list[str]]:
    """What the comment says of a model, and a sentence for each convention that others will apply and it breaks."""
    convention = _CONVENTION if resolve_shape(model.config).is_transformer else {}
    said = {key: getattr(model.config, key) for key in convention if getattr(model.config, key) != convention[key]}
    pixels = {key: list(value) if isinstance(value, tuple) else value for key, value in (model.pixels or {}).items()}
    if pixels and pixels != _PIXELS:
        said |= pixels
    usual = _CONVENTION | _PIXELS
    notes = [
        f"other programs that read the file take {key} {usual[key]}, and this model has {value}"
        for key, value in said.items()
        if key in usual and value != usual[key]
    ]
    if not resolve_shape(model.config).is_transformer and model.config.image_size != IMAGE_SIZE:
        said["image_size"] = model.config.image_size
    if model.class_names is not None:
        named = {**said, "class_names": list(model.class_names)}
        if len(_comment(named)) > _LONGEST_COMMENT:
            notes.append(f"the names of the {len(model.class_names):,} classes have no room in the file")
        else:
            said = named
    return said, notes


# ---- names and shapes


class _Names:
    """The arrays of a file under the official names of a model with one array per block."""

    def __init__(self, arrays: Mapping[str, _Array], where: str) -> None:
        self._where = where
        self._stored: dict[str, tuple[str, int | None]] = {}
        self.shapes: dict[str, Dimensions] = {}
        official = any(f"/{_OFFICIAL.attention}/" in name for name in arrays)
        table = (_BIG_VISION if _BIG_VISION.positions in arrays else _OFFICIAL).positions
        self.layout = (_OFFICIAL if official else _BIG_VISION)._replace(positions=table)
        depths = set()
        for name, array in arrays.items():
            if not name.startswith(_STACKED):
                self._add(name, name, None, array.shape)
                continue
            layers = array.shape[0] if array.shape else 0
            depths.add(layers)
            if len(depths) > 1 or not 0 < layers <= _MOST_ARRAYS // len(arrays):
                raise UserError(
                    f"{where}: array '{brief(name)}' has shape {list(array.shape)}, and the first axis of every array "
                    f"of '{_STACKED}' must be the number of blocks"
                )
            for layer in range(layers):
                inner = f"Transformer/encoderblock_{layer}/{name.removeprefix(_STACKED)}"
                self._add(inner, name, layer, array.shape[1:])

    def _add(self, name: str, stored: str, layer: int | None, shape: Dimensions) -> None:
        if name in self.shapes:
            raise UserError(f"{self._where}: array '{brief(name)}' is there twice, also in '{_STACKED}'")
        self._stored[name], self.shapes[name] = (stored, layer), shape

    def stored(self, name: str) -> tuple[str, int | None]:
        """The array of the file that holds `name`, and the block within it."""
        return self._stored[name]

    def entries(self, config: ModelConfig) -> Iterator[Entry]:
        return npz_entries(config, self.layout, self.shapes)

    def config(self, said: Mapping[str, Any]) -> ModelConfig:
        """The model that the shapes are of."""
        layout, resnet = self.layout, hybrid_resnet(self.shapes, self._where)
        side, _, channels, width = self._shape_of("embedding/kernel", "patch height, patch width, 3, width", 4)
        depth = len({match[1] for name in self.shapes if (match := _BLOCK.fullmatch(name))})
        query = f"Transformer/encoderblock_0/{layout.attention}/query/kernel"
        _, heads, head_width = self._shape_of(query, "width, heads, head width", 3)
        _, mlp_dim = self._shape_of(f"Transformer/encoderblock_0/{layout.mlp}/Dense_0/kernel", "width, hidden width", 2)
        _, positions, _ = self._shape_of(layout.positions, "1, positions, width", 3)
        pool = "map" if f"{_POOL}/probe" in self.shapes else "cls" if "cls" in self.shapes else "gap"
        if pool == "map" and "cls" in self.shapes:
            raise UserError(
                f"{self._where} has a class token, array 'cls', beside attention pooling, array '{_POOL}/probe': no "
                "model of this version has both"
            )
        what = f"{self._where}: array '{layout.positions}'"
        grid = grid_side(positions, int(pool == "cls" and layout.positions != _BIG_VISION.positions), what)
        num_classes = self._shape_of("head/kernel", "width, classes", 2)[1] if "head/kernel" in self.shapes else 0
        if heads * head_width != width:
            raise UserError(
                f"{self._where}: array '{query}' has {heads} heads of {head_width}, which do not make the width {width}"
            )
        if side == 0 or channels != (3 if resnet is None else resnet.channels):
            fit = "RGB images" if resnet is None else f"the {resnet.channels} channels of its ResNet"
            raise UserError(f"{self._where}: array 'embedding/kernel' is no kernel for {fit}")
        numbers = {"patch_size": side, "width": width, "depth": depth, "heads": heads, "mlp_dim": mlp_dim}
        model = model_of_shape(**numbers)
        if resnet is not None:
            side = self._name_hybrid(model, resnet, side)
        model |= {
            "image_size": grid * side,
            "num_classes": num_classes,
            "pool": pool,
            "head": "mlp" if "pre_logits/kernel" in self.shapes else "linear",
        }
        differs = {key: said[key] for key in _CONVENTION if key in said}
        config = model_config(model | _CONVENTION | differs, self._where)
        resolve_shape(config)
        return config

    def _name_hybrid(self, model: dict[str, Any], resnet: ResNetShape, cells: int) -> int:
        """Sets the name of a hybrid, from that of its Transformer; returns its patch size in pixels."""
        name = hybrid_name(resnet, model["name"].partition("/")[0])
        hybrid = None if name is None else hybrid_of(name)
        if hybrid is None or hybrid.cells != cells:
            raise UserError(
                f"{self._where} has a ResNet of {', '.join(map(str, resnet.stages)) or 'no'} blocks and "
                f"{resnet.width} channels before patches of {cells} x {cells} cells, which is no hybrid that this "
                "version knows, as R50+B/16"
            )
        model["name"] = name
        return hybrid.patch_size

    def _shape_of(self, name: str, meaning: str, axes: int) -> Dimensions:
        shape = self.shapes.get(name)
        if shape is None:
            others = ", ".join(f"'{brief(other)}'" for other in sorted(self.shapes)[:3])
            raise UserError(
                f"{self._where} has no array '{name}', and is no Vision Transformer that this version knows "
                f"(it has {others or 'nothing'})"
            )
        if len(shape) != axes:
            raise UserError(f"{self._where}: array '{brief(name)}' has shape {list(shape)}, and must be [{meaning}]")
        return shape


class _BitNames:
    """The arrays of a file of BiT under their plain names."""

    def __init__(self, arrays: Mapping[str, _Array], where: str) -> None:
        self._where, self._stored = where, plain_names(arrays)
        self.shapes = {name: arrays[stored].shape for name, stored in self._stored.items()}

    def stored(self, name: str) -> tuple[str, None]:
        return self._stored[name], None

    def entries(self, config: ModelConfig) -> Iterator[Entry]:
        return bit_entries(config, self.shapes)

    def config(self, said: Mapping[str, Any]) -> ModelConfig:
        """The model that the shapes are of. No array says the image size; files of ours do."""
        size = {"image_size": said.get("image_size", IMAGE_SIZE)}
        return model_config(bit_config(self.shapes, self._where) | size, self._where)


def npz_entries(
    config: ModelConfig, layout: _Layout, shapes: Mapping[str, Dimensions] | None = None
) -> Iterator[Entry]:
    """One entry per parameter of a Vision Transformer or hybrid. shapes: of the arrays of a file, if there is one."""
    shape = resolve_shape(config)
    width, (channels, patch, _) = shape.width, shape.patch_inputs
    if shape.resnet is not None:
        yield from hybrid_entries(shape.resnet, shapes)
    # big_vision adds the class token after the positions, and it has none
    absent = int(config.pool == "cls" and layout.positions == _BIG_VISION.positions)
    if config.pool == "cls":
        yield same("cls_token", "cls", 1, 1, width)
    table = (1, shape.positions, width)
    yield Entry("pos_embed", table, {layout.positions: (1, shape.positions - absent, width)}, absent_rows=absent)
    kernel = {"embedding/kernel": (patch, patch, channels, width)}
    yield Entry("patch_embed.proj.weight", (width, channels, patch, patch), kernel, axes=(2, 3, 1, 0))
    yield same("patch_embed.proj.bias", "embedding/bias", width)
    for index in range(shape.depth):
        yield from _block(shape, f"blocks.{index}", f"Transformer/encoderblock_{index}", layout)
    yield from _norm("norm", "Transformer/encoder_norm", width)
    if config.pool == "map":
        yield from _attention_pool(shape)
    if config.head == "mlp":
        yield from _linear("pre_logits.fc", "pre_logits", width, width)
    if config.num_classes:
        yield from _linear("head", "head", width, config.num_classes)


def _block(shape: Shape, ours: str, block: str, layout: _Layout) -> Iterator[Entry]:
    yield from _norm(f"{ours}.norm1", f"{block}/LayerNorm_0", shape.width)
    attention = f"{block}/{layout.attention}"
    yield from _projections(shape, f"{ours}.attn.qkv", attention, "query", "key", "value")
    yield from _output(shape, f"{ours}.attn.proj", attention)
    yield from _norm(f"{ours}.norm2", f"{block}/{layout.norm2}", shape.width)
    yield from _mlp(shape, f"{ours}.mlp", f"{block}/{layout.mlp}")


def _attention_pool(shape: Shape) -> Iterator[Entry]:
    ours, attention = "attn_pool", f"{_POOL}/{_BIG_VISION.attention}"
    yield same(f"{ours}.latent", f"{_POOL}/probe", 1, 1, shape.width)
    yield from _projections(shape, f"{ours}.q", attention, "query")
    yield from _projections(shape, f"{ours}.kv", attention, "key", "value")
    yield from _output(shape, f"{ours}.proj", attention)
    yield from _norm(f"{ours}.norm", f"{_POOL}/LayerNorm_0", shape.width)
    yield from _mlp(shape, f"{ours}.mlp", f"{_POOL}/{_BIG_VISION.mlp}")


def _projections(shape: Shape, ours: str, attention: str, *parts: str) -> Iterator[Entry]:
    """One linear layer of ours that has several of theirs, each divided into heads."""
    width, heads, head_width = shape.width, shape.heads, shape.width // shape.heads
    kernels = {f"{attention}/{part}/kernel": (width, heads, head_width) for part in parts}
    biases = {f"{attention}/{part}/bias": (heads, head_width) for part in parts}
    yield Entry(f"{ours}.weight", (len(parts) * width, width), kernels, axes=(1, 0))
    yield Entry(f"{ours}.bias", (len(parts) * width,), biases)


def _output(shape: Shape, ours: str, attention: str) -> Iterator[Entry]:
    width, heads = shape.width, shape.heads
    kernel = {f"{attention}/out/kernel": (heads, width // heads, width)}
    yield Entry(f"{ours}.weight", (width, width), kernel, axes=(1, 0))
    yield same(f"{ours}.bias", f"{attention}/out/bias", width)


def _mlp(shape: Shape, ours: str, theirs: str) -> Iterator[Entry]:
    yield from _linear(f"{ours}.fc1", f"{theirs}/Dense_0", shape.width, shape.mlp_dim)
    yield from _linear(f"{ours}.fc2", f"{theirs}/Dense_1", shape.mlp_dim, shape.width)


def _norm(ours: str, theirs: str, width: int) -> Iterator[Entry]:
    yield same(f"{ours}.weight", f"{theirs}/scale", width)
    yield same(f"{ours}.bias", f"{theirs}/bias", width)


def _linear(ours: str, theirs: str, inputs: int, outputs: int) -> Iterator[Entry]:
    yield Entry(f"{ours}.weight", (outputs, inputs), {f"{theirs}/kernel": (inputs, outputs)}, axes=(1, 0))
    yield same(f"{ours}.bias", f"{theirs}/bias", outputs)


# ---- bytes


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what a damaged archive raises into one sentence."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except UserError:
        raise
    except _UNREADABLE as error:
        reason = brief(error) or type(error).__name__
        raise UserError(f"{path} is not a complete .npz file ({reason}): get it again") from error


def _arrays(archive: zipfile.ZipFile, path: Path) -> Iterator[_Array]:
    """The arrays of an archive, by their headers, which are checked against the sizes of the members."""
    members = archive.infolist()
    total, size = sum(member.file_size for member in members), path.stat().st_size
    if len(members) > _MOST_ARRAYS or total > _SPARE + _MOST_COMPRESSED * size:
        raise UserError(
            f"{path} has {size:,} bytes and says that it holds {len(members):,} arrays of {total:,} bytes: no weights "
            "compress so well, it is damaged or made to fill the memory"
        )
    seen: set[str] = set()
    for member in members:
        if not member.filename.endswith(".npy") or member.filename in seen:
            raise UserError(f"{path} holds '{brief(member.filename)}', which is no array or is there twice")
        seen.add(member.filename)
        with archive.open(member) as file:
            shape, fortran, dtype = _header(file)
            stored = file.tell() + math.prod(shape) * dtype.itemsize
        name = brief(member.filename[:-4])
        if dtype.hasobject:
            raise UserError(f"{path}: array '{name}' holds pickled Python objects, which are not read")
        if _floats(dtype) is None:
            raise UserError(f"{path}: array '{name}' holds {brief(dtype)}, and weights are floating-point")
        if stored != member.file_size:
            raise ValueError(f"array '{name}' has not the size of its shape {shape}")
        yield _Array(member, shape, dtype, fortran)


def _header(file: IO[bytes]) -> tuple[Dimensions, bool, np.dtype[Any]]:
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an array has version {version} of the format")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if any(length < 0 for length in shape):
        raise ValueError(f"an array has shape {shape}")
    return shape, fortran, dtype


def _floats(dtype: np.dtype[Any]) -> Callable[[np.ndarray], np.ndarray] | None:
    """Makes float32 of an array of this type; None if it holds no floating-point numbers."""
    if dtype.kind == "f" and dtype.itemsize in (2, 4, 8):
        return lambda array: array.astype("<f4")
    if dtype.kind == "V" and dtype.itemsize == 2 and dtype.fields is None and dtype.subdtype is None:  # bfloat16
        return lambda array: (array.view("<u2").astype("<u4") << 16).view("<f4")
    return None


def _read(archive: zipfile.ZipFile, array: _Array) -> Tensor:
    """The array as float32, after its checksum was verified."""
    with archive.open(array.member) as file:
        _header(file)
        content = file.read()
    convert = _floats(array.dtype)
    assert convert is not None  # _arrays has refused others
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is refused by its name
        values = convert(np.frombuffer(content, array.dtype))
    return torch.from_numpy(values.reshape(array.shape, order="F" if array.fortran else "C").copy(order="C"))


def _without_prefix(arrays: dict[str, _Array]) -> dict[str, _Array]:
    """The weights alone, of a file that has the state of a training, or a text model, too."""
    for prefix, others in _PREFIXES.items():
        if f"{prefix}embedding/kernel" in arrays or f"{prefix}root_block/conv_root/kernel" in arrays:
            return {
                name.removeprefix(prefix): array
                for name, array in arrays.items()
                if name.startswith(prefix) or not name.startswith(others)
            }
    return arrays


def _comment(said: Mapping[str, Any]) -> bytes:
    return json.dumps({"fastvit": said}).encode()


def _said(comment: bytes) -> dict[str, Any]:
    """What the comment of the archive says; nothing if it is not of ours."""
    try:
        said = json.loads(comment)["fastvit"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
