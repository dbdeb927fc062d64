"""Starting from a checkpoint, and from the one before it where the newest is damaged."""

from dataclasses import replace
from functools import partial

from fastvit_engine.observe.events import record_event
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.train.checkpoint import Checkpointer, DamagedCheckpoint, usable_checkpoints
from fastvit_engine.train.distributed import World
from fastvit_engine.train.preflight import Start, newest_readable


def load_start(start: Start, checkpointer: Checkpointer, run: RunFolder, world: World) -> Start:
    """Loads the checkpoint that a run is to start from, if there is one; returns where it starts. Collective.

    A damaged checkpoint is an event and a line on the terminal, and the next older one is loaded in its place.
    UserError where there is none.
    """
    reported = 0
    while start.checkpoint is not None:
        for damage in start.damaged[reported:] if world.is_main else ():
            message = f"{damage}: going back to {start.checkpoint}"
            record_event(run, "checkpoint_damaged", message, step=start.checkpoint.step)
            print(f"warning: {message}", flush=True)
        reported = len(start.damaged)
        try:
            checkpointer.load(start.checkpoint)
            return start
        except DamagedCheckpoint as damage:
            start = world.on_main(partial(_before, start, str(damage)))
    return start


def _before(start: Start, damage: str) -> Start:
    assert start.checkpoint is not None
    older = [c for c in usable_checkpoints(start.checkpoint.place) if c.step < start.checkpoint.step]
    checkpoint, state, damaged = newest_readable(older, (*start.damaged, damage))
    assert checkpoint is not None
    return replace(start.at(checkpoint, state), damaged=damaged)
