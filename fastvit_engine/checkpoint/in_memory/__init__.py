"""Copies of the newest state in memory that outlives the ranks: a killed rank costs a few steps, not an interval.

The launcher holds one `area.py` for each rank, and its ranks inherit them. `copies.py` is what training sees of them:
each rank copies its part of a checkpoint there, step after step. `store.py` reads the newest step that all ranks have
whole, as a checkpoint. `holder.py` is the launcher's side.
"""

from fastvit_engine.checkpoint.in_memory.area import Area, inherited_areas
from fastvit_engine.checkpoint.in_memory.contents import Unsettled
from fastvit_engine.checkpoint.in_memory.copies import Copies
from fastvit_engine.checkpoint.in_memory.holder import Holder, can_hold, held_copies
from fastvit_engine.checkpoint.in_memory.store import MemoryStore, newest_in_memory

__all__ = [
    "Area",
    "Copies",
    "Holder",
    "MemoryStore",
    "Unsettled",
    "can_hold",
    "held_copies",
    "inherited_areas",
    "newest_in_memory",
]
