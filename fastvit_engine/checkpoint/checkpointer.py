"""The two verbs that training needs, `save` and `load`, and what tells it how saving went."""

import contextlib
import time
import uuid
from collections.abc import Callable, Mapping

from torch import Tensor
from torch.distributed import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store

from fastvit_engine.checkpoint.format import BUFFERS, DamagedCheckpoint, Manifest
from fastvit_engine.checkpoint.open import another_place
from fastvit_engine.checkpoint.reader import CheckpointReader
from fastvit_engine.checkpoint.retention import stale_checkpoints
from fastvit_engine.checkpoint.store import Checkpoint, CheckpointStore, step_name
from fastvit_engine.checkpoint.trainer_state import TrainerState
from fastvit_engine.checkpoint.writer import HostCopy, SaveInFlight, SaveOutcome
from fastvit_engine.config import CheckpointConfig
from fastvit_engine.distributed.world import World
from fastvit_engine.engine.ema import WeightAverage
from fastvit_engine.engine.protocol import ParameterSlice, TrainingEngine, share
from fastvit_engine.errors import RestartError, UserError
from fastvit_engine.observe import disk
from fastvit_engine.observe.events import record_event
from fastvit_engine.observe.run_folder import RunFolder

_LONGEST_PAUSE = 5.0  # seconds between two attempts to save at the end
_MOST_FAILURES = 3  # saves in a row that may fail while training continues


class Checkpointer:
    """Saves and loads the state of one run; every public method is collective.

    keep_every: steps of which every multiple stays, or None. `say` shows a sentence to the user, on rank 0.
    `check_owner` raises UserError if this run must not write any more; it is called on rank 0 before each write.
    `upload_records` brings the run's records to where they are kept; a checkpoint is published only after it returns.
    `before_reading` is called on every process, with the bytes of each file that it is about to read.
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
        upload_records: Callable[[], None] = lambda: None,
    ) -> None:
        self.run, self.store, self.engine, self.ema, self.world = run, store, engine, ema, world
        self.settings, self.keep_every, self.say = settings, keep_every, say
        self.check_owner, self.upload_records = check_owner, upload_records
        self.before_reading: Callable[[Checkpoint, Mapping[str, tuple[int, int]]], None] = lambda *_: None
        self._host_copy = HostCopy()
        self._in_flight: SaveInFlight | None = None
        self._seconds_blocked = 0.0
        self._failures = 0  # in a row
        self._error: str | None = None  # of the last save
        self._closing = False
        self._state: TrainerState | None = None  # of the last save
        self._remarks: list[str] = []  # on what else went wrong with a save, from the thread of rank 0
        # A name of its own for each Checkpointer, which reports of an earlier one cannot be mistaken for.
        name = world.on_main(lambda: uuid.uuid4().hex)
        self._reports = PrefixStore(f"checkpoint-{name}", _get_default_store())
        world.on_main(lambda: disk.insist(store.clean, store.describe(""), instead="checkpoint.path"))

    def save(self, state: TrainerState) -> None:
        """Begins to save `step-N`; training continues, and calls `before_update` next. `settle` tells how it ended.

        Waits for the previous save, if it is still being written. A save that fails is an event; the third in a row is
        a RestartError, as `observe/disk.py` explains.
        """
        started = time.perf_counter()
        if self._in_flight is not None:
            if self.world.is_main:
                self.say(f"step {state.step:,}: waiting until {self._in_flight.checkpoint} is written")
            self.settle(wait=True)
        self._state = state
        checkpoint = Checkpoint(self.store, step_name(state.step))
        slices = self.slices_to_write()
        size = sum(self.world.gather(sum(p.values.nbytes for of_kind in slices.values() for p in of_kind)))
        if (error := self._on_main(lambda: self._prepare(checkpoint, size))) is not None:
            self._failed(checkpoint, error)
            return
        manifest = self.manifest(state)
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
        Raises RestartError on every process if three saves in a row have failed, and UserError if this run does not own
        the place any more. wait: until the save in flight has ended.
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
            for remark in self._remarks:
                self.say(remark)
            self._remarks = []
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
        """`settle`, for the end of a run: waits for the last save, and tries again for a while if that has failed.

        Raises RestartError if it fails for longer. The state of the engine must be the one of the last save.
        """
        self._closing = True
        published, began, pause = self.settle(wait=True), time.monotonic(), 0.1
        while self._error is not None and self._state is not None:
            if self.world.on_main(lambda: time.monotonic() - began >= disk.PATIENCE_SECONDS):
                raise RestartError(self._error)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            self.save(self._state)
            published = self.settle(wait=True)
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
            kinds = sorted(manifest.kinds.difference({"weight", "ema"}, BUFFERS))
            self.engine.prepare_optimizer({kind: manifest.shapes_of(kind).keys() for kind in kinds}, manifest.scalars)
            wanted: dict[str, list[ParameterSlice]] = {
                "weight": self.engine.master_weights(),
                **self.engine.optimizer_state(),
                **self.engine.optimizer_statistics(),
            }
            wanted["buffer"] = self.engine.buffers()
            if self.ema is not None and "ema" in manifest.kinds:
                wanted["ema"] = self.ema.slices()
                wanted["ema_buffer"] = self.ema.statistics_slices()
            reader = CheckpointReader(checkpoint, manifest)
            ranges = reader.ranges(wanted)
        except (UserError, RestartError) as failure:
            error = failure
        except OSError as failure:
            error = disk.unreadable(str(checkpoint), failure)
        self._agree(error)
        try:
            self.before_reading(checkpoint, ranges)
            reader.fill(wanted)
        except (UserError, RestartError) as failure:
            error = failure
        except OSError as failure:
            error = disk.unreadable(str(checkpoint), failure)
        self._agree(error)
        self.engine.publish()
        self.engine.reset_progress(manifest.step)
        if self.ema is not None and "ema" not in manifest.kinds:
            self.ema.restart()
            self._say_on_main(f"{checkpoint} has no average of the weights: it starts from the weights of this step")
        if self.ema is None and "ema" in manifest.kinds:
            self._say_on_main(f"{checkpoint} has an average of the weights, which is dropped: ema.decay is null")
        return manifest.state

    def slices_to_write(self) -> dict[str, list[ParameterSlice]]:
        """This process's part of the state; what every process holds is shared out evenly."""
        slices = {"weight": self.engine.master_weights(), **self.engine.optimizer_state()}
        if self.ema is not None:
            slices["ema"] = self.ema.slices()
        rank, size = self.world.rank, self.world.size
        if self.engine.replicated:
            slices = {kind: share(of_kind, rank, size) for kind, of_kind in slices.items()}
        whole = {**self.engine.optimizer_statistics(), "buffer": self.engine.buffers()}
        if self.ema is not None:
            whole["ema_buffer"] = self.ema.statistics_slices()
        return {**slices, **{kind: share(of_kind, rank, size) for kind, of_kind in whole.items()}}

    def tensors_to_write(self) -> list[Tensor]:
        """What `slices_to_write` are views of; they are the same as long as these are, and this is cheap."""
        averages = [] if self.ema is None else [*self.ema.average, *self.ema.statistics]
        return [*self.engine.state_tensors(), *averages]

    def manifest(self, state: TrainerState) -> Manifest:
        """All but the files."""
        engine, shapes, frozen = self.engine, self.engine.shapes, self.engine.frozen
        usual = {name: shape for name, shape in shapes.items() if name not in frozen}
        special = {kind: of_kind for kind, of_kind in engine.optimizer_shapes().items() if of_kind != usual}
        return Manifest(state, engine.scalars(), shapes, files={}, frozen=frozen, state_shapes=special)

    def _prepare(self, checkpoint: Checkpoint, size: int) -> None:
        self.check_owner()
        self.store.prepare(checkpoint.name, size)

    def _publish(self, checkpoint: Checkpoint, manifest: Manifest) -> None:
        """Completes the checkpoint, then removes those that need not stay. Runs in the thread of rank 0.

        A failure after the first step is a remark: the checkpoint is complete, and a resume finds it.
        """
        self.upload_records()
        self.check_owner()
        self.store.publish(checkpoint.name, manifest.to_json())
        pointed = self._point_latest(checkpoint.name) is None
        try:
            self._remove_old(checkpoint.name, manifest.state)
        except (OSError, RestartError) as error:
            self._remarks.append(f"old checkpoints in {self.store.describe('')} could not be removed ({error})")
        # Again, if need be: removing checkpoints has made room.
        if not pointed and (problem := self._point_latest(checkpoint.name)) is not None:
            where = self.store.describe("latest")
            self._remarks.append(f"{where} could not be written ({problem}): a resume finds {checkpoint} all the same")

    def _point_latest(self, name: str) -> str | None:
        """Why `latest` could not be written, if so."""
        try:
            self.store.point_latest(name)
        except OSError as error:
            return disk.reason(error)
        return None

    def _remove_old(self, newest: str, state: TrainerState) -> None:
        others = [name for name in self.store.names() if name != newest]
        states = {newest: state} | {name: _state_or_nothing(Checkpoint(self.store, name)) for name in others}
        keep, best = self.settings.keep, self.settings.keep_best
        for name in stale_checkpoints(states, keep=keep, keep_every=self.keep_every, best=best):
            if name != newest:
                self.store.remove(name)

    def _failed(self, checkpoint: Checkpoint, error: str) -> None:
        """Notes a failed save. RestartError on every process when it is one too many in a row."""
        message = f"checkpoint {checkpoint} could not be written ({error}): the previous checkpoint is intact"
        self._failures += 1
        self._error = f"{message}; make room and run the same command again"
        if self.world.is_main and not (self._closing and self._failures > 1):
            record_event(self.run, "checkpoint_failed", message, step=checkpoint.step, cause=error)
            self.say(message)
        if self._failures >= _MOST_FAILURES and not self._closing:
            raise RestartError(self._error)

    def _check_shapes(self, checkpoint: Checkpoint, manifest: Manifest) -> None:
        here, there = self.engine.shapes, manifest.parameters
        for name in sorted(here.keys() | there.keys()):
            if here.get(name) != there.get(name):
                raise UserError(
                    f"{checkpoint}/manifest.json: parameter '{name}' is {there.get(name, 'absent')} there and "
                    f"{here.get(name, 'absent')} in this model: choose {another_place(self.settings)}"
                )

    def _agree(self, error: Exception | None) -> None:
        """Raises on every process what any of them holds; damage only if there is nothing worse."""
        kinds = (UserError, RestartError, DamagedCheckpoint)  # the worst first
        found = self.world.gather(None if error is None else (kinds.index(type(error)), str(error)))
        failed = [(kind, rank, text) for rank, failure in enumerate(found) if failure for kind, text in [failure]]
        if failed:
            kind, _, text = min(failed)
            raise kinds[kind](text) from error

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
