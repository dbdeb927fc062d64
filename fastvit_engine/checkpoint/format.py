"""What a checkpoint holds: one safetensors file per process, and a manifest that says what lies where.

`rank-00003.safetensors` holds 1-D tensors named `weight/blocks.0.mlp.fc1.weight@4096`: a kind (weight, ema, buffer, or
a key of the optimizer such as exp_avg), a parameter, and the position in the flattened parameter where they begin.
`manifest.json` is written last. It has the state of the run, the shape of every parameter, and where each tensor lies
in its file, with its CRC-32: one checksum per tensor, so that a process verifies all that it reads and nothing else,
and an error can name the parameter. CRC-32 comes with Python, runs at 1 to 2 GB/s outside the GIL, and finds
what happens to files: lost, cut and flipped bytes. There is no pickle.
"""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from fastvit_engine.checkpoint.trainer_state import TrainerState
from fastvit_engine.errors import UserError
from fastvit_engine.models.weights.safetensors_file import DTYPES, safetensors_header

MANIFEST = "manifest.json"
FORMAT = 1
_CHUNK = 2**23  # bytes written and summed at a time


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
    start: int  # first element in the flattened parameter
    length: int  # elements
    offset: int  # bytes, in the file
    crc32: int

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def nbytes(self) -> int:
        return self.length * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class StoredFile:
    """Bytes of a file, and its tensors as (kind, parameter, where it lies)."""

    size: int
    tensors: list[tuple[str, str, StoredTensor]]


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says of a checkpoint."""

    state: TrainerState
    scalars: dict[str, float]  # the optimizer's counters, the loss scale
    parameters: dict[str, list[int]]  # shapes
    files: dict[str, StoredFile]

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def kinds(self) -> set[str]:
        return {kind for file in self.files.values() for kind, _, _ in file.tensors}

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
        for kind in sorted(self.kinds - {"buffer"}):
            stored = self.stored(kind)
            for name, shape in self.parameters.items():
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
        }
        return json.dumps(content).encode()

    @classmethod
    def from_json(cls, text: bytes, where: str) -> "Manifest":
        """Raises DamagedCheckpoint if it is not what `to_json` wrote, UserError if a later version wrote it."""
        try:
            content = json.loads(text)
            if (written := content["format"]) != FORMAT:
                raise UserError(f"{where} has format {written}, and this version reads {FORMAT}: use the one it is of")
            files = {
                name: StoredFile(
                    file["size"],
                    [(kind, parameter, StoredTensor(**tensor)) for kind, parameter, tensor in file["tensors"]],
                )
                for name, file in content["files"].items()
            }
            state = TrainerState.from_json(content["state"])
            return cls(state, content["scalars"], content["parameters"], files)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DamagedCheckpoint(f"{where} is not what was written there: the file is damaged") from error


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
