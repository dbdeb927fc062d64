"""Starting from a checkpoint, and from the one before it where the newest is damaged."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from fastvit_engine.observe.events import record_event
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.train.checkpoint import Checkpoint, Checkpointer, DamagedCheckpoint, usable_checkpoints
from fastvit_engine.train.distributed import World
from fastvit_engine.train.preflight import Start, newest_readable


def load_start(start: Start, checkpointer: Checkpointer, run: RunFolder, world: World) -> Start:
    """Loads the checkpoint that a run is to start from, if there is one; returns where it starts. Collective.

    A damaged one is reported, and the next older one is loaded in its place. UserError where there is none.
    """
    while start.checkpoint is not None:
        try:
            checkpointer.load(start.checkpoint)
            return start
        except DamagedCheckpoint as damage:
            found, start = len(start.damaged), world.on_main(partial(_before, start, str(damage)))
            if world.is_main:
                report_damage(run, start.damaged[found:], start.checkpoint)
    return start


def report_damage(run: RunFolder, damaged: Sequence[str], used: Checkpoint | None) -> None:
    """Says on the terminal and among the run's events what is wrong with checkpoints, and which is `used` instead."""
    for damage in damaged:
        message = f"{damage}: going back to {used}"
        print(f"warning: {message}", flush=True)
        record_event(run, "checkpoint_damaged", message)


def _before(start: Start, damage: str) -> Start:
    """The same run from an older checkpoint on."""
    assert start.checkpoint is not None
    older = [c for c in usable_checkpoints(start.checkpoint.place) if c.step < start.checkpoint.step]
    checkpoint, state, damaged = newest_readable(older, (*start.damaged, damage))
    assert checkpoint is not None  # newest_readable raises where damaged ones are all there is
    return replace(start.at(checkpoint, state), damaged=damaged)
