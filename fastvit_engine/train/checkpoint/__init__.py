"""Checkpoints: asynchronous, checksummed, and readable by any number of processes at any ZeRO stage.

`format.py` says what files hold, `place.py` where they lie (`local.py`, `remote.py`), `writer.py` and `reader.py` move
them, `retention.py` chooses what stays, and `checkpointer.py` is what training sees of it.
"""

from fastvit_engine.train.checkpoint.checkpointer import Checkpointer
from fastvit_engine.train.checkpoint.format import DamagedCheckpoint, Manifest
from fastvit_engine.train.checkpoint.place import Checkpoint, Place, open_place, place_of, usable_checkpoints

__all__ = [
    "Checkpoint",
    "Checkpointer",
    "DamagedCheckpoint",
    "Manifest",
    "Place",
    "open_place",
    "place_of",
    "usable_checkpoints",
]
