"""Checkpoints that are complete or absent.

DeepSpeed writes each one under `step-N.partial`; when every process has succeeded, the folder gets its final name
`step-N` in one rename, and only then does `latest` point to it. A kill or a full disk at any moment therefore leaves
the previous checkpoint in place and usable.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastvit_engine.errors import UserError
from fastvit_engine.observe.run_folder import RunFolder, atomic_write, flush_to_disk
from fastvit_engine.train.distributed import World
from fastvit_engine.train.ema import WeightAverage


def latest_checkpoint(run: RunFolder) -> Path | None:
    """The checkpoint that `latest` names, or None for a run that has none yet."""
    pointer = run.checkpoints / "latest"
    if not pointer.exists():
        return None
    folder = run.checkpoints / pointer.read_text().strip()
    if not (folder / "state.json").is_file():
        raise UserError(
            f"{pointer} names {folder.name}, which is not a complete checkpoint: restore it or remove 'latest'"
        )
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    """What the trainer noted beside the weights: step, seconds, and what the run looked like."""
    return json.loads((folder / "state.json").read_text())


class Checkpointer:
    """Saves and loads the state of one run; every method is collective."""

    def __init__(self, run: RunFolder, engine: Any, ema: WeightAverage | None, world: World, keep: int) -> None:
        self.run, self.engine, self.ema, self.world, self.keep = run, engine, ema, world, keep
        self.files = _RememberingFiles(engine.checkpoint_engine)
        engine.checkpoint_engine = self.files
        engine._copy_recovery_script = lambda path: None  # a write outside checkpoint_engine, whose failure would hang
        if world.is_main:
            for leftover in [*run.checkpoints.glob("*.partial"), *run.checkpoints.glob("*.removed")]:
                shutil.rmtree(leftover)

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Writes `step-N`, points `latest` at it, and removes checkpoints beyond the newest `keep`.

        Raises UserError on every process when any of them could not write; the previous checkpoint stays.
        """
        folder = self.run.checkpoints / f"step-{step:08d}"
        partial = folder.with_name(folder.name + ".partial")
        self.world.agree(_explained(self._try(self._prepare, partial), folder))
        self.files.error = None
        self.engine.save_checkpoint(str(self.run.checkpoints), tag=partial.name, save_latest=False)
        error = self.files.error or self._try(self._save_average, partial)
        try:
            self.world.agree(_explained(error, folder))
            self.world.agree(_explained(self._try(self._publish, partial, folder, step, state), folder))
        except UserError:
            if self.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        return folder

    def load(self, folder: Path) -> dict[str, Any]:
        """Restores weights, optimizer and average from a checkpoint of the same fingerprint; returns its state.

        Weight decay, betas and eps stay those of this run's configuration, not the checkpoint's.
        """
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.engine.optimizer.param_groups]
        try:
            path, _ = self.engine.load_checkpoint(str(folder.parent), tag=folder.name)
            if path is None:
                raise FileNotFoundError("DeepSpeed found no weights in it")
            if self.ema is not None:
                self.ema.load_state_dict(torch.load(self._average_file(folder), map_location=self.world.device))
        except Exception as error:  # torch.load and DeepSpeed raise whatever the damaged file makes them trip over
            raise UserError(
                f"checkpoint {folder} cannot be read ({' '.join(str(error).split())}): remove it and point "
                f"{folder.parent / 'latest'} at an older one, or start again in another run folder"
            ) from error
        for group, configured in zip(self.engine.optimizer.param_groups, settings, strict=True):
            group.update(configured)
        return read_state(folder)

    def _prepare(self, partial: Path) -> None:
        if self.world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def _average_file(self, folder: Path) -> Path:
        assert self.ema is not None
        return folder / (f"ema_rank_{self.world.rank:05d}.pt" if self.ema.sharded else "ema.pt")

    def _save_average(self, partial: Path) -> None:
        if self.ema is not None and (self.ema.sharded or self.world.is_main):
            torch.save(self.ema.state_dict(), self._average_file(partial))

    def _publish(self, partial: Path, folder: Path, step: int, state: Mapping[str, Any]) -> None:
        if not self.world.is_main:
            return
        atomic_write(partial / "state.json", json.dumps({"step": step, **state}, indent=1))
        for file in partial.rglob("*"):
            flush_to_disk(file)
        flush_to_disk(partial)
        if folder.exists():  # left by a run whose `latest` was set back by hand
            _remove(folder)
        os.replace(partial, folder)
        atomic_write(self.run.checkpoints / "latest", folder.name)
        complete = sorted(
            path for path in self.run.checkpoints.glob("step-*") if path.name.removeprefix("step-").isdigit()
        )
        for old in [path for path in complete if path != folder][: max(0, len(complete) - self.keep)]:
            _remove(old)

    @staticmethod
    def _try(action: Any, *arguments: Any) -> Exception | None:
        try:
            action(*arguments)
        except (OSError, RuntimeError) as error:
            return error
        return None


class _RememberingFiles:
    """DeepSpeed's file writer, except that it remembers a failure instead of raising it.

    A process that raised in the middle of `save_checkpoint` would leave the others waiting at its barrier for ever.
    """

    def __init__(self, files: Any) -> None:
        self.files = files
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.files, name)

    def save(self, state_dict: Any, path: str) -> None:
        try:
            self.files.save(state_dict, path)
        except (OSError, RuntimeError) as error:
            self.error = error


def _explained(error: Exception | None, folder: Path) -> Exception | None:
    if error is None:
        return None
    free = shutil.disk_usage(folder.parent).free
    return UserError(
        f"checkpoint {folder} could not be written ({' '.join(str(error).split())}; {free / 1e6:.0f} MB free on "
        "that disk): the previous checkpoint is intact; make room and run the same command again"
    )


def _remove(folder: Path) -> None:
    """Renames first, so that a kill in the middle never leaves half a folder under a checkpoint's name."""
    doomed = folder.with_name(folder.name + ".removed")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)
