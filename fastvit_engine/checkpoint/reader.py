"""Reading pieces out of a checkpoint, whatever the number of processes and the ZeRO stage that wrote it."""

import mmap
import zlib
from collections.abc import Mapping, Sequence

import torch

from fastvit_engine.checkpoint.format import DTYPES, MANIFEST, DamagedCheckpoint, Manifest, StoredTensor
from fastvit_engine.checkpoint.place import Checkpoint
from fastvit_engine.engine.deepspeed import Piece

Pieces = Mapping[str, Sequence[Piece]]  # by kind


class Reader:
    """The stored tensors of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, manifest: Manifest) -> None:
        self.checkpoint, self.manifest = checkpoint, manifest
        self._stored = {kind: manifest.stored(kind) for kind in manifest.kinds}

    @torch.no_grad()
    def fill(self, wanted: Pieces) -> None:
        """Overwrites the pieces with what is stored, one file after the other; every byte used is verified.

        DamagedCheckpoint, naming file and parameter, where something is missing, cut or altered: then some of the
        pieces may have been overwritten.
        """
        needed: dict[str, list[tuple[str, Piece, StoredTensor]]] = {}
        for kind, pieces in wanted.items():
            for piece in pieces:
                for file, tensor in self.overlapping(kind, piece.name, piece.start, piece.stop):
                    needed.setdefault(file, []).append((kind, piece, tensor))
        for file, uses in needed.items():
            self._fill_from(file, uses)

    def overlapping(self, kind: str, name: str, start: int, stop: int) -> list[tuple[str, StoredTensor]]:
        """The stored tensors that cover elements [start, stop) of a parameter, in order, with their files.

        DamagedCheckpoint where they leave a gap.
        """
        place, found = start, []
        for file, tensor in self._stored.get(kind, {}).get(name, []):
            if tensor.start <= place < tensor.stop and place < stop:
                found.append((file, tensor))
                place = tensor.stop
        if place < stop:
            raise DamagedCheckpoint(
                f"{self.checkpoint}/{MANIFEST} names no file with element {place:,} of parameter '{name}' ({kind})"
            )
        return found

    def verified(self, content: mmap.mmap, file: str, kind: str, name: str, tensor: StoredTensor) -> memoryview:
        """The bytes of a stored tensor; DamagedCheckpoint where they are not those that were written."""
        part = memoryview(content)[tensor.offset : tensor.offset + tensor.nbytes]
        if zlib.crc32(part) != tensor.crc32:
            raise DamagedCheckpoint(
                f"{self.checkpoint}/{file} does not hold the bytes of parameter '{name}' ({kind}) that were written"
            )
        return part

    def _fill_from(self, file: str, uses: Sequence[tuple[str, Piece, StoredTensor]]) -> None:
        stored = self.manifest.files[file]
        first = min(tensor.offset for _, _, tensor in uses)
        last = max(tensor.offset + tensor.nbytes for _, _, tensor in uses)
        try:
            content = self.checkpoint.place.map(self.checkpoint.name, file, stored.size, first, last)
            checked: dict[StoredTensor, torch.Tensor] = {}
            for kind, piece, tensor in uses:
                if tensor not in checked:
                    part = self.verified(content, file, kind, piece.name, tensor)
                    checked[tensor] = torch.frombuffer(part, dtype=DTYPES[tensor.dtype])
                start, stop = max(piece.start, tensor.start), min(piece.stop, tensor.stop)
                values = checked[tensor][start - tensor.start : stop - tensor.start]
                piece.values[start - piece.start : stop - piece.start].copy_(values)
        except DamagedCheckpoint as error:
            if "parameter" in str(error):
                raise
            kind, piece, _ = uses[0]
            raise DamagedCheckpoint(f"{error}, which parameter '{piece.name}' ({kind}) is in") from error
