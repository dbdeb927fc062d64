"""Copies of the newest state in memory that outlives the ranks: a killed rank costs a step, not an interval.

The launcher holds one `area.py` for each rank of its node (`holder.py`), and its ranks find them (`held.py`).
`copies.py` is what training sees of them: each rank copies its part of a checkpoint there, step after step
(`contents.py`), and on several nodes sends it to the next one, too (`neighbour.py`, `messages.py`). At a start,
`across.py` finds the newest step of which every rank's part is somewhere, and `store.py` reads it as a checkpoint.
"""

from fastvit_engine.checkpoint.in_memory.across import HeldCopies
from fastvit_engine.checkpoint.in_memory.contents import Unsettled
from fastvit_engine.checkpoint.in_memory.copies import Copies
from fastvit_engine.checkpoint.in_memory.held import Held, held_here
from fastvit_engine.checkpoint.in_memory.holder import Holder, can_hold, held_copies
from fastvit_engine.checkpoint.in_memory.messages import Messages
from fastvit_engine.checkpoint.in_memory.store import MemoryStore

__all__ = [
    "Copies",
    "Held",
    "HeldCopies",
    "Holder",
    "MemoryStore",
    "Messages",
    "Unsettled",
    "can_hold",
    "held_copies",
    "held_here",
]
