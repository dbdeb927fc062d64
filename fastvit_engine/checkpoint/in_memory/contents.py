"""What a rank copies and how a copy is described, kept from step to step as far as it stays the same.

A description is two documents of JSON: what changes with every step in one line, and a manifest of all else, which is
written anew only if the state is in other tensors. Collecting slices and writing a manifest takes longer than copying
the state of a small model.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit_engine.checkpoint.checkpointer import Checkpointer
from fastvit_engine.checkpoint.format import DamagedCheckpoint, Manifest, StoredFile, StoredTensor
from fastvit_engine.checkpoint.in_memory.area import Area, Slot
from fastvit_engine.checkpoint.trainer_state import TrainerState
from fastvit_engine.checkpoint.writer import DTYPE_NAMES, Placed, Transfer, placed_in_order, transfer_into

Unsettled = Mapping[str, Any]  # what a rank counts by itself between two logged steps, as JSON


class Label(NamedTuple):
    """Whose copy it is: only copies of one start and of all its ranks are a state."""

    start: str  # what tells this start of the run from those before and after it
    world_size: int
    rank: int


@dataclass(frozen=True)
class Contents:
    """The slices of a copy, valid as long as the state is in the tensors that it was made for."""

    addresses: list[int]  # of those tensors; the slices keep theirs from being freed, so no other gets such an address
    placed: list[Placed]
    size: int  # bytes
    manifest: bytes
    _transfers: dict[Slot, Transfer] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpointer: Checkpointer, state: TrainerState, tensors: Sequence[Tensor], file: str) -> "Contents":
        """file: the name of this rank's part. tensors: those that the checkpointer writes now."""
        placed = placed_in_order(checkpointer.slices_to_write())
        size = sum(part.values.nbytes for _, part, _ in placed)
        stored = [
            (kind, part.name, StoredTensor(DTYPE_NAMES[part.values.dtype], part.start, len(part.values), offset, 0))
            for kind, part, offset in placed
        ]
        manifest = checkpointer.manifest(state)
        manifest.files[file] = StoredFile(size, stored)
        return cls([tensor.data_ptr() for tensor in tensors], placed, size, manifest.to_json())

    def is_for(self, tensors: Sequence[Tensor]) -> bool:
        return self.addresses == [tensor.data_ptr() for tensor in tensors]

    def describe(self, label: Label, state: TrainerState, scalars: Mapping[str, float], unsettled: Unsettled) -> bytes:
        changing = {"label": label, "state": state.to_json(), "scalars": scalars, "unsettled": unsettled}
        return json.dumps(changing).encode() + b"\n" + self.manifest

    def transfer_to(self, area: Area, slot: Slot) -> Transfer:
        """What to copy to a slot, whose memory stays mapped."""
        if slot not in self._transfers:
            memory = torch.frombuffer(area.memory(slot), dtype=torch.uint8)
            self._transfers[slot] = transfer_into(memory, self.placed)
        return self._transfers[slot]


class Described(NamedTuple):
    """What a description says."""

    label: Label
    manifest: Manifest  # of one rank's part
    unsettled: Unsettled

    @classmethod
    def read(cls, description: bytes, where: str) -> "Described":
        """Raises DamagedCheckpoint if it is not what `Contents.describe` wrote."""
        line, _, manifest = description.partition(b"\n")
        try:
            changing = json.loads(line)
            label, state = Label(*changing["label"]), TrainerState.from_json(changing["state"])
            scalars, unsettled = changing["scalars"], changing["unsettled"]
        except (ValueError, TypeError, KeyError) as error:
            raise DamagedCheckpoint(f"{where} is not what was written there") from error
        return cls(label, replace(Manifest.from_json(manifest, where), state=state, scalars=scalars), unsettled)


def label_of(description: bytes) -> Label:
    """Whose copy a description is of; quicker than to read it all."""
    return Label(*json.loads(description.partition(b"\n")[0])["label"])
