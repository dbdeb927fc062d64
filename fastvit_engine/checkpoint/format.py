"""What a checkpoint holds: one safetensors file per process, and a manifest that says what lies where.

`rank-00003.safetensors` holds 1-D tensors named `weight/blocks.0.mlp.fc1.weight@4096`: a kind (weight, ema, buffer,
ema_buffer, or a key of the optimizer such as exp_avg), a parameter, and the position in the flattened parameter where
they begin. `manifest.json` is written last. It has the state of the run, the shape of every parameter, which of them do
not learn and so have no optimizer state, which state is of other shapes or of some parameters only, and where each
tensor lies in its file, with its CRC-32: one checksum per tensor, so that a process verifies all that it reads and
nothing else, and an error can name the parameter. It ends with a CRC-32 of itself. CRC-32 comes with Python, runs at 1
to 2 GB/s outside the GIL, and finds what happens to files: lost, cut and flipped bytes. There is no pickle.
"""

import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, Field

from fastvit_engine.checkpoint.trainer_state import TrainerState
from fastvit_engine.errors import UserError
from fastvit_engine.models import is_for_pretraining
from fastvit_engine.models.weights.safetensors_file import DTYPES, safetensors_header

MANIFEST = "manifest.json"
FORMAT = 1
BUFFERS = ("buffer", "ema_buffer")  # the kinds of tensors that are not of parameters: buffers, and averages of some
_CHUNK = 2**23  # bytes written and summed at a time
_CHECKSUM = re.compile(rb', "crc32": ([0-9]{1,10})\}\Z')  # what a manifest ends with
_UNCHECKED = {"format", "step", "state", "scalars", "parameters", "files"}  # the keys of one without a checksum

# What a manifest may hold, however damaged: every number that is used to read a file is checked first.
_Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
_Number = Annotated[float, Field(strict=True)]  # an integer is one, too


class DamagedCheckpoint(UserError):
    """A checkpoint that is not whole: an older one may be."""


class Block(NamedTuple):
    """A 1-D tensor as bytes, and its name in the file."""

    name: str
    dtype: str
    content: memoryview


@dataclass(frozen=True)
class StoredTensor:
    """Where a slice of a parameter lies in its file."""

    dtype: str
    start: _Count  # first element in the flattened parameter
    length: _Count  # elements
    offset: _Count  # bytes, in the file
    crc32: _Count

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def nbytes(self) -> int:
        return self.length * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class StoredFile:
    """Bytes of a file, and its tensors as (kind, parameter, where it lies)."""

    size: _Count
    tensors: list[tuple[str, str, StoredTensor]]


class _Document(BaseModel):
    """The form of `manifest.json`; keys that a later version may add are passed over."""

    state: dict[str, Any]  # see TrainerState
    scalars: dict[str, _Number]
    parameters: dict[str, list[_Count]]
    files: dict[str, StoredFile]
    frozen: list[str] = []
    state_shapes: dict[str, dict[str, list[_Count]]] = {}


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says of a checkpoint."""

    state: TrainerState
    scalars: dict[str, float]  # the optimizer's counters, the loss scale
    parameters: dict[str, list[int]]  # shapes
    files: dict[str, StoredFile]
    frozen: frozenset[str] = frozenset()  # parameters that do not learn, of which the optimizer keeps nothing
    # By kind, the shapes of state that is not there for all parameters that learn, or not in their shapes.
    state_shapes: dict[str, dict[str, list[int]]] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def of_model(self) -> dict[str, list[int]]:
        """Shapes of the parameters that the model keeps when pretraining is over."""
        return {name: shape for name, shape in self.parameters.items() if not is_for_pretraining(name)}

    @property
    def kinds(self) -> set[str]:
        return {kind for file in self.files.values() for kind, _, _ in file.tensors}

    def kind_of_each(self, names: Iterable[str], kind: str) -> dict[str, str]:
        """The kind of tensors that parameters and buffers of a model are read from; kind: weight or ema."""
        averaged = self.stored("ema_buffer") if kind == "ema" else {}
        of_buffer = {name: "ema_buffer" if name in averaged else "buffer" for name in self.stored("buffer")}
        return {name: kind if name in self.parameters else of_buffer.get(name, kind) for name in names}

    def shapes_of(self, kind: str) -> dict[str, list[int]]:
        """The parameters that have state of a kind, and its whole shapes."""
        if kind in ("weight", "ema"):
            return self.parameters
        learning = {name: shape for name, shape in self.parameters.items() if name not in self.frozen}
        return self.state_shapes.get(kind, learning)

    def stored(self, kind: str) -> dict[str, list[tuple[str, StoredTensor]]]:
        """For each parameter the stored slices of one kind, by position, each with the name of its file."""
        found: dict[str, list[tuple[str, StoredTensor]]] = {}
        for file_name, file in self.files.items():
            for of_kind, name, tensor in file.tensors:
                if of_kind == kind:
                    found.setdefault(name, []).append((file_name, tensor))
        for slices in found.values():
            slices.sort(key=lambda entry: entry[1].start)
        return found

    def gap(self) -> str | None:
        """What is missing of the parameters, in words; None if each kind is there once and whole."""
        for kind in sorted(self.kinds.difference(BUFFERS)):
            stored = self.stored(kind)
            for name, shape in self.shapes_of(kind).items():
                size = torch.Size(shape).numel()
                ends = [0, *(edge for _, t in stored.get(name, []) for edge in (t.start, t.stop)), size]
                if any(stop != start for stop, start in list(pairwise(ends))[::2]):
                    return f"parameter '{name}' ({kind}) is not there whole"
        return None

    def to_json(self) -> bytes:
        content = {
            "format": FORMAT,
            "step": self.step,
            "state": self.state.to_json(),
            "scalars": self.scalars,
            "parameters": self.parameters,
            "files": {name: asdict(file) for name, file in self.files.items()},
            **({"frozen": sorted(self.frozen)} if self.frozen else {}),
            **({"state_shapes": self.state_shapes} if self.state_shapes else {}),
        }
        text = json.dumps(content).encode()
        return text[:-1] + b', "crc32": %d}' % zlib.crc32(text)

    @classmethod
    def from_json(cls, text: bytes, where: str) -> "Manifest":
        """Raises DamagedCheckpoint if it is not what `to_json` wrote, UserError if a later version wrote it.

        Manifests of earlier versions have no checksum of themselves.
        """
        try:
            content = json.loads(text)
            if content.keys() != _UNCHECKED:
                _verify(text)
            if type(written := content["format"]) is not int:
                raise TypeError(f"format {written!r} is not a number")
            if written != FORMAT:
                raise UserError(f"{where} has format {written}, and this version reads {FORMAT}: use the one it is of")
            document = _Document.model_validate(content)
            _check_positions(document)
            state = TrainerState.from_json(document.state)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise DamagedCheckpoint(f"{where} is not what was written there: the file is damaged") from error
        frozen = frozenset(document.frozen)
        return cls(state, document.scalars, document.parameters, document.files, frozen, document.state_shapes)


def _verify(text: bytes) -> None:
    """Raises ValueError unless a manifest ends with the checksum of what precedes it."""
    end = _CHECKSUM.search(text, max(0, len(text) - 64))
    if end is None or zlib.crc32(text[: end.start()] + b"}") != int(end[1]):
        raise ValueError("its checksum does not match")


def _check_positions(document: _Document) -> None:
    """Raises ValueError if a tensor lies outside of its file or its parameter."""
    whole = {name: math.prod(shape) for name, shape in document.parameters.items()}
    others = {
        kind: {name: math.prod(shape) for name, shape in shapes.items()}
        for kind, shapes in document.state_shapes.items()
    }
    if any(sizes.keys() - whole.keys() for sizes in others.values()):
        raise ValueError("there is state of a parameter that is not there")
    for file_name, file in document.files.items():
        if "/" in file_name or "\0" in file_name:
            raise ValueError(f"{file_name!r} is not the name of a file")
        for kind, name, tensor in file.tensors:
            if tensor.dtype not in DTYPES or tensor.offset + tensor.nbytes > file.size:
                raise ValueError(f"{name} ({kind}) is not in {file_name}")
            if kind not in BUFFERS and tensor.stop > others.get(kind, whole)[name]:
                raise ValueError(f"{name} ({kind}) has no element {tensor.stop}")


class TensorFile:
    """The bytes of a safetensors file whose tensors lie in memory."""

    def __init__(self, blocks: Sequence[Block], metadata: Mapping[str, str] | None = None) -> None:
        self.blocks = blocks
        sizes = {block.name: block.content.nbytes for block in blocks}
        shapes = {block.name: [block.content.nbytes // DTYPES[block.dtype].itemsize] for block in blocks}
        dtypes = {block.name: block.dtype for block in blocks}
        self.header = safetensors_header(dtypes, shapes, sizes, metadata)
        self.size = len(self.header) + sum(sizes.values())
        self.crc32: list[int] = []  # of the tensors that `chunks` has passed

    def chunks(self) -> Iterator[memoryview]:
        """The file from beginning to end; sums it on the way."""
        self.crc32 = []
        yield memoryview(self.header)
        for block in self.blocks:
            crc = 0
            for start in range(0, block.content.nbytes, _CHUNK):
                chunk = block.content[start : start + _CHUNK]
                crc = zlib.crc32(chunk, crc)
                yield chunk
            self.crc32.append(crc)

    def stored(self) -> StoredFile:
        """The file's entry in the manifest, after `chunks`."""
        tensors, offset = [], len(self.header)
        for block, crc in zip(self.blocks, self.crc32, strict=True):
            kind, _, rest = block.name.partition("/")
            name, _, start = rest.rpartition("@")
            length = block.content.nbytes // DTYPES[block.dtype].itemsize
            tensors.append((kind, name, StoredTensor(block.dtype, int(start), length, offset, crc)))
            offset += block.content.nbytes
        return StoredFile(self.size, tensors)
