"""Reading parameter slices out of a checkpoint, whatever the number of processes and the ZeRO stage that wrote it."""

import mmap
import zlib
from collections.abc import Mapping, Sequence

import torch

from fastvit_engine.checkpoint.format import MANIFEST, DamagedCheckpoint, Manifest, StoredTensor
from fastvit_engine.checkpoint.store import Checkpoint
from fastvit_engine.engine.protocol import ParameterSlice
from fastvit_engine.models.weights.safetensors_file import DTYPES

SlicesByKind = Mapping[str, Sequence[ParameterSlice]]
Use = tuple[str, ParameterSlice, StoredTensor]  # kind, what to fill, and a stored tensor that overlaps with it


class CheckpointReader:
    """The stored tensors of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, manifest: Manifest) -> None:
        self.checkpoint, self.manifest = checkpoint, manifest
        self._stored = {kind: manifest.stored(kind) for kind in manifest.kinds}

    @torch.no_grad()
    def fill(self, wanted: SlicesByKind) -> None:
        """Overwrites the slices with what is stored, one file after the other; every byte used is verified.

        Raises DamagedCheckpoint, naming file and parameter, if something is missing, cut or altered: then some of the
        slices may have been overwritten.
        """
        for file, uses in self._needed(wanted).items():
            self._fill_from(file, uses)

    def ranges(self, wanted: SlicesByKind) -> dict[str, tuple[int, int]]:
        """The bytes [first, last) of each file that `fill` reads; raises as it does if something is missing."""
        return {file: _range(uses) for file, uses in self._needed(wanted).items()}

    def _needed(self, wanted: SlicesByKind) -> dict[str, list[Use]]:
        needed: dict[str, list[Use]] = {}
        for kind, slices in wanted.items():
            for part in slices:
                for file, tensor in self.overlapping(kind, part.name, part.start, part.stop):
                    needed.setdefault(file, []).append((kind, part, tensor))
        return needed

    def overlapping(self, kind: str, name: str, start: int, stop: int) -> list[tuple[str, StoredTensor]]:
        """The stored tensors that cover elements [start, stop) of a parameter, in order, with their files.

        Raises DamagedCheckpoint if they leave a gap.
        """
        covered, found = start, []
        for file, tensor in self._stored.get(kind, {}).get(name, []):
            if tensor.start <= covered < tensor.stop and covered < stop:
                found.append((file, tensor))
                covered = tensor.stop
        if covered < stop:
            raise DamagedCheckpoint(
                f"{self.checkpoint}/{MANIFEST} names no file with element {covered:,} of parameter '{name}' ({kind})"
            )
        return found

    def verified(self, content: mmap.mmap, file: str, kind: str, name: str, tensor: StoredTensor) -> memoryview:
        """The bytes of a stored tensor. Raises DamagedCheckpoint if they are not those that were written."""
        part = memoryview(content)[tensor.offset : tensor.offset + tensor.nbytes]
        if self.checkpoint.store.has_checksums and zlib.crc32(part) != tensor.crc32:
            raise DamagedCheckpoint(
                f"{self.checkpoint}/{file} does not hold the bytes of parameter '{name}' ({kind}) that were written"
            )
        return part

    def _fill_from(self, file: str, uses: Sequence[Use]) -> None:
        stored = self.manifest.files[file]
        first, last = _range(uses)
        try:
            content = self.checkpoint.store.map(self.checkpoint.name, file, stored.size, first, last)
            checked: dict[StoredTensor, torch.Tensor] = {}
            for kind, part, tensor in uses:
                if tensor not in checked:
                    stored_bytes = self.verified(content, file, kind, part.name, tensor)
                    checked[tensor] = torch.frombuffer(stored_bytes, dtype=DTYPES[tensor.dtype])
                start, stop = max(part.start, tensor.start), min(part.stop, tensor.stop)
                values = checked[tensor][start - tensor.start : stop - tensor.start]
                part.values[start - part.start : stop - part.start].copy_(values)
        except DamagedCheckpoint as error:
            if "parameter" in str(error):
                raise
            kind, part, _ = uses[0]
            raise DamagedCheckpoint(f"{error}, which parameter '{part.name}' ({kind}) is in") from error


def _range(uses: Sequence[Use]) -> tuple[int, int]:
    """The bytes of a file that they read."""
    return min(tensor.offset for _, _, tensor in uses), max(tensor.offset + tensor.nbytes for _, _, tensor in uses)
