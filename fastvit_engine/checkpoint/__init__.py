"""Checkpoints: asynchronous, checksummed, and readable by any number of processes at any ZeRO stage.

`format.py` says what files hold, `store.py` where they lie (`local.py`, `remote.py`, `open.py`), `writer.py` and
`reader.py` move them, `retention.py` chooses what stays, and `checkpointer.py` is what training sees of it.
"""

from fastvit_engine.checkpoint.checkpointer import Checkpointer
from fastvit_engine.checkpoint.format import DamagedCheckpoint, Manifest
from fastvit_engine.checkpoint.open import another_place, open_store, store_of
from fastvit_engine.checkpoint.store import Checkpoint, CheckpointStore, doubt_about_latest, usable_checkpoints
from fastvit_engine.checkpoint.trainer_state import Recovery, TrainerState

__all__ = [
    "Checkpoint",
    "Checkpointer",
    "DamagedCheckpoint",
    "Manifest",
    "CheckpointStore",
    "Recovery",
    "TrainerState",
    "another_place",
    "doubt_about_latest",
    "open_store",
    "store_of",
    "usable_checkpoints",
]
