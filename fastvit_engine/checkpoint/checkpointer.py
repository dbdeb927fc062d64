"""The two verbs that training needs, `save` and `load`, and what tells it how saving went."""

import contextlib
import time
import uuid
from collections.abc import Callable

from torch.distributed import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store

from fastvit_engine.checkpoint.format import DamagedCheckpoint, Manifest
from fastvit_engine.checkpoint.reader import CheckpointReader
from fastvit_engine.checkpoint.retention import stale_checkpoints
from fastvit_engine.checkpoint.store import Checkpoint, CheckpointStore, step_name
from fastvit_engine.checkpoint.trainer_state import TrainerState
from fastvit_engine.checkpoint.writer import HostCopy, SaveInFlight, SaveOutcome
from fastvit_engine.config import CheckpointConfig
from fastvit_engine.distributed.world import World
from fastvit_engine.engine.ema import WeightAverage
from fastvit_engine.engine.protocol import ParameterSlice, TrainingEngine, share
from fastvit_engine.errors import UserError
from fastvit_engine.observe.events import record_event
from fastvit_engine.observe.run_folder import RunFolder

_MOST_FAILURES = 3  # saves in a row that may fail while training continues


class Checkpointer:
    """Saves and loads the state of one run; every public method is collective.

    keep_every: steps of which every multiple stays, or None. `say` shows a sentence to the user, on rank 0.
    `check_owner` raises UserError if this run must not write any more; it is called on rank 0 before each write.
    """

    def __init__(
        self,
        run: RunFolder,
        store: CheckpointStore,
        engine: TrainingEngine,
        ema: WeightAverage | None,
        world: World,
        settings: CheckpointConfig,
        keep_every: int | None = None,
        say: Callable[[str], None] = print,
        check_owner: Callable[[], None] = lambda: None,
    ) -> None:
        self.run, self.store, self.engine, self.ema, self.world = run, store, engine, ema, world
        self.settings, self.keep_every, self.say = settings, keep_every, say
        self.check_owner = check_owner
        self._host_copy = HostCopy()
        self._in_flight: SaveInFlight | None = None
        self._seconds_blocked = 0.0
        self._failures = 0  # in a row
        self._error: str | None = None  # of the last save
        self._not_removed: str | None = None  # why old checkpoints are still there, from the thread of rank 0
        # A name of its own for each Checkpointer, which reports of an earlier one cannot be mistaken for.
        name = world.on_main(lambda: uuid.uuid4().hex)
        self._reports = PrefixStore(f"checkpoint-{name}", _get_default_store())
        if (problem := self._on_main(self.store.clean)) is not None:
            raise UserError(f"{store.describe('')} cannot be used for checkpoints ({problem}): check checkpoint.path")

    def save(self, state: TrainerState) -> None:
        """Begins to save `step-N`; training continues, and calls `before_update` next. `settle` tells how it ended.

        Waits for the previous save, if it is still being written. A save that fails is an event; the third in a row, an
        error.
        """
        started = time.perf_counter()
        if self._in_flight is not None:
            if self.world.is_main:
                self.say(f"step {state.step:,}: waiting until {self._in_flight.checkpoint} is written")
            self.settle(wait=True)
        checkpoint = Checkpoint(self.store, step_name(state.step))
        slices = self._slices_to_write()
        size = sum(self.world.gather(sum(p.values.nbytes for of_kind in slices.values() for p in of_kind)))
        if (error := self._on_main(lambda: self._prepare(checkpoint, size))) is not None:
            self._failed(checkpoint, error)
            return
        manifest = Manifest(state, self.engine.scalars(), self.engine.shapes, files={})
        blocks = self._host_copy.begin(slices)
        self._in_flight = SaveInFlight(
            checkpoint,
            manifest,
            blocks,
            self._host_copy.wait,
            self._reports,
            self.world.rank,
            self.world.size,
            lambda complete: self._publish(checkpoint, complete),
        )
        self._seconds_blocked = time.perf_counter() - started

    def before_update(self) -> None:
        """Returns when weights and optimizer state may change, because all that is being saved has been copied."""
        if self._in_flight is None:
            return
        started = time.perf_counter()
        with contextlib.suppress(Exception):  # the thread of the save meets it, too, and reports it
            self._host_copy.wait()
        self._seconds_blocked += time.perf_counter() - started

    def settle(self, *, wait: bool = False) -> Checkpoint | None:
        """The checkpoint published since the last call, if any, which becomes an event and a line for the user.

        Meant for every logged step: it costs nothing when no save is in flight, and a small broadcast when one is.
        Raises UserError on every process if three saves in a row have failed. wait: until the save in flight has ended.
        """
        if (save := self._in_flight) is None:
            return None
        while (outcome := self.world.on_main(lambda: _plain(save.outcome))) is None:
            if not wait:
                return None
            time.sleep(0.05)
        save.join()
        self._in_flight = None
        error, lost, size, seconds = outcome
        if error is not None and lost:
            raise UserError(error)
        if error is not None:
            self._failed(save.checkpoint, error)
            return None
        self._failures, self._error = 0, None
        if self.world.is_main:
            if self._not_removed is not None:
                self.say(self._not_removed)
                self._not_removed = None
            record_event(
                self.run,
                "checkpoint",
                f"saved {save.checkpoint}",
                step=save.checkpoint.step,
                path=str(save.checkpoint),
                seconds_blocked=round(self._seconds_blocked, 4),
                seconds_written=round(seconds, 4),
                bytes=size,
            )
            self.say(f"saved {save.checkpoint}")
        return save.checkpoint

    def close(self) -> Checkpoint | None:
        """`settle`, for the end of a run: waits for the last save. Raises UserError if that has failed."""
        published = self.settle(wait=True)
        if self._error is not None:
            raise UserError(self._error)
        return published

    def load(self, checkpoint: Checkpoint) -> TrainerState:
        """Restores weights, optimizer, counters and average; returns the state of the run.

        The checkpoint may be of any number of processes, ZeRO stage and precision. Weight decay, betas and eps stay
        those of this run. Raises DamagedCheckpoint on every process if it is not whole; then the engine holds neither
        the state before nor the checkpoint's, until another one is loaded.
        """
        self.settle(wait=True)
        error: Exception | None = None
        try:
            manifest = checkpoint.read_manifest()
            self._check_shapes(checkpoint, manifest)
            keys = manifest.kinds - {"weight", "ema", "buffer"}
            self.engine.prepare_optimizer(sorted(keys), manifest.scalars)
            wanted: dict[str, list[ParameterSlice]] = {
                "weight": self.engine.master_weights(),
                **self.engine.optimizer_state(),
            }
            wanted["buffer"] = self.engine.buffers()
            if self.ema is not None and "ema" in manifest.kinds:
                wanted["ema"] = self.ema.slices()
            CheckpointReader(checkpoint, manifest).fill(wanted)
        except UserError as failure:
            error = failure
        except OSError as failure:
            error = UserError(f"{checkpoint} cannot be read ({failure}): check the disk or the store, then resume")
        self._agree(error)
        self.engine.publish()
        self.engine.reset_progress(manifest.step)
        if self.ema is not None and "ema" not in manifest.kinds:
            self.ema.restart()
            self._say_on_main(f"{checkpoint} has no average of the weights: it starts from the weights of this step")
        if self.ema is None and "ema" in manifest.kinds:
            self._say_on_main(f"{checkpoint} has an average of the weights, which is dropped: ema.decay is null")
        return manifest.state

    def _slices_to_write(self) -> dict[str, list[ParameterSlice]]:
        """This process's part of the state; what every process holds is shared out evenly."""
        slices = {"weight": self.engine.master_weights(), **self.engine.optimizer_state()}
        if self.ema is not None:
            slices["ema"] = self.ema.slices()
        rank, size = self.world.rank, self.world.size
        if self.engine.replicated:
            slices = {kind: share(of_kind, rank, size) for kind, of_kind in slices.items()}
        return {**slices, "buffer": share(self.engine.buffers(), rank, size)}

    def _prepare(self, checkpoint: Checkpoint, size: int) -> None:
        self.check_owner()
        self.store.prepare(checkpoint.name, size)

    def _publish(self, checkpoint: Checkpoint, manifest: Manifest) -> None:
        """Completes the checkpoint, then removes those that need not stay. Runs in the thread of rank 0."""
        self.check_owner()
        self.store.publish(checkpoint.name, manifest.to_json())
        states = {checkpoint.name: manifest.state}
        for name in self.store.names():
            if name != checkpoint.name:
                states[name] = _state_or_nothing(Checkpoint(self.store, name))
        keep, best = self.settings.keep, self.settings.keep_best
        try:
            for name in stale_checkpoints(states, keep=keep, keep_every=self.keep_every, best=best):
                if name != checkpoint.name:
                    self.store.remove(name)
        except OSError as error:  # the new one is there all the same
            self._not_removed = f"checkpoint {self.store.describe(name)} could not be removed ({error})"

    def _failed(self, checkpoint: Checkpoint, error: str) -> None:
        """Notes a failed save. UserError on every process when it is one too many in a row."""
        message = f"checkpoint {checkpoint} could not be written ({error}): the previous checkpoint is intact"
        self._failures += 1
        self._error = f"{message}; make room and run the same command again"
        if self.world.is_main:
            record_event(self.run, "checkpoint_failed", message, step=checkpoint.step, cause=error)
            self.say(message)
        if self._failures >= _MOST_FAILURES:
            raise UserError(self._error)

    def _check_shapes(self, checkpoint: Checkpoint, manifest: Manifest) -> None:
        here, there = self.engine.shapes, manifest.parameters
        for name in sorted(here.keys() | there.keys()):
            if here.get(name) != there.get(name):
                raise UserError(
                    f"{checkpoint}/manifest.json: parameter '{name}' is {there.get(name, 'absent')} there and "
                    f"{here.get(name, 'absent')} in this model: choose another run folder with --out"
                )

    def _agree(self, error: Exception | None) -> None:
        """Raises on every process what any of them holds; damage only if there is nothing worse."""
        found = self.world.gather(None if error is None else (isinstance(error, DamagedCheckpoint), str(error)))
        failed = [
            (is_damage, text, rank) for rank, failure in enumerate(found) if failure for is_damage, text in [failure]
        ]
        if failed:
            is_damage, text, _ = min(failed)
            raise (DamagedCheckpoint if is_damage else UserError)(text) from error

    def _on_main(self, action: Callable[[], None]) -> str | None:
        """Does something on rank 0; what went wrong, on every process."""

        def attempt() -> str | None:
            try:
                action()
            except OSError as error:
                return " ".join(str(error.strerror or error).split())
            return None

        return self.world.on_main(attempt)

    def _say_on_main(self, text: str) -> None:
        if self.world.is_main:
            self.say(text)


def _plain(outcome: SaveOutcome | None) -> tuple[str | None, bool, int, float] | None:
    return None if outcome is None else (outcome.error, outcome.lost, outcome.bytes, outcome.seconds)


def _state_or_nothing(checkpoint: Checkpoint) -> TrainerState:
    """What retention needs to know of an older checkpoint, even if its manifest is damaged."""
    try:
        return checkpoint.read_manifest().state
    except UserError:
        return TrainerState(checkpoint.step, fingerprint={})
