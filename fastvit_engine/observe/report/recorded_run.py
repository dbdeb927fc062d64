"""Reads a run back from its folder, finished or not, and sums it up in sentences."""

import re
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from fastvit_engine.errors import UserError
from fastvit_engine.observe.events import Event, read_events
from fastvit_engine.observe.metrics import EvalRow, FewShotRow, LossRow, OwnRow, TrainRow, read_all_metrics
from fastvit_engine.observe.owner_record import Holder
from fastvit_engine.observe.report.axes import Progress
from fastvit_engine.observe.report.incidents import describe_incidents, restarts
from fastvit_engine.observe.report.inspected import InspectedFigure, read_inspected
from fastvit_engine.observe.report.page import Table
from fastvit_engine.observe.report.predictions import (
    Classes,
    Reconstructions,
    Samples,
    read_classes,
    read_json,
    read_reconstructions,
    read_samples,
)
from fastvit_engine.observe.report.profiles import read_profiles
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.observe.units import counted, format_count, format_duration, format_share
from fastvit_engine.shown import brief, recorded, without_secrets

# Written by the trainer beside `collect_environment()`: what the report needs, and its types.
_ENVIRONMENT: dict[str, Any] = {
    "versions": dict,
    "hostname": str,
    "started": str,
    "model": str,
    "parameters": int,
    "training_flops_per_image": int | float,
    "peak_flops": int | float | None,
    "peak_flops_source": str | None,
    "world_size": int,
    "zero_stage": int,
    "precision": str,
    "device": str,
    "total_steps": int,
    "global_batch_size": int,
    "samples_per_epoch": int | None,
    "shards": str,
}
State = Literal["finished", "in progress", "no sign of life", "not running"]
_MOST = 1e30  # numbers in it are less
_SIZES_SHOWN = 3  # numbers of processes that are listed one by one
_CONTINUES = "the same command with --resume auto continues it"


@dataclass(frozen=True)
class RecordedRun:
    """The content of a run folder, in memory."""

    folder: RunFolder
    environment: dict[str, Any]
    train: list[TrainRow]
    evaluations: list[EvalRow]
    few_shot: list[FewShotRow]
    own: list[OwnRow]
    losses: list[LossRow]
    events: list[Event]
    samples: Samples | None
    classes: Classes | None
    reconstructions: Reconstructions | None
    inspected: list[InspectedFigure]  # by `fastvit inspect`
    profiles: list[Table]
    config: str | None  # YAML text
    holder: Holder | None = None  # who works on the run; None: nobody

    @property
    def step(self) -> int:
        """The last step known to be done."""
        kinds = (self.train, self.evaluations, self.few_shot, self.own, self.losses)
        return max((rows[-1]["step"] for rows in kinds if rows), default=0)

    @property
    def finished(self) -> bool:
        return self.step >= self.environment["total_steps"]

    @property
    def state(self) -> State:
        if self.finished:
            return "finished"
        if self.holder is None:
            return "not running"
        return "in progress" if self.holder.silent_seconds is None else "no sign of life"

    def describe_state(self) -> str:
        """Who works on the run, and what to do if nobody does; empty if it is finished."""
        if self.finished:
            return ""
        if self.holder is None:
            last = next((event for event in reversed(self.events) if event["event"] in ("start", "stop")), None)
            how = "was stopped on request" if last is not None and last["event"] == "stop" else "ended early"
            return f"{self.state}: it {how}; {_CONTINUES}"
        if self.holder.silent_seconds is None:
            return f"{self.state}: {self.holder.who}"
        silence = format_duration(self.holder.silent_seconds)
        return f"{self.state} from {self.holder.who} for {silence}: if that is gone, {_CONTINUES}"

    @property
    def world_sizes(self) -> list[int]:
        """Numbers of processes that have taken steps, one after another; the last is that of the latest start."""
        starts = [
            event for event in self.events if event["event"] == "start" and {"step", "world_size"} <= event.keys()
        ]
        sizes: list[int] = []
        for start, later in zip(starts, starts[1:], strict=False):
            if start["step"] < later["step"]:  # it left a checkpoint
                sizes.append(int(start["world_size"]))  # type: ignore[typeddict-item]
        sizes.append(self.environment["world_size"])
        return [size for size, _ in groupby(sizes)]

    def describe_processes(self) -> str:
        """How many there were, as in "2 processes", "2, then 1 process" or "1 to 8 processes"."""
        sizes = self.world_sizes
        if len(sizes) <= _SIZES_SHOWN:
            before = "".join(f"{size:,}, then " for size in sizes[:-1])
            return before + counted(sizes[-1], "process", "processes")
        return f"{min(sizes):,} to {max(sizes):,} processes"

    @property
    def seconds(self) -> float:
        """Training time over all restarts."""
        return self.train[-1]["seconds"] if self.train else 0.0

    def evaluations_of(self, kind: str) -> list[EvalRow]:
        """`kind` is "eval" or "eval_ema"."""
        return [row for row in self.evaluations if row["eval"] == kind]

    def losses_of(self, kind: str) -> list[EvalRow | LossRow]:
        """The held-out losses, with or without accuracy. `kind` as above."""
        return [row for row in (*self.evaluations, *self.losses) if row["eval"] == kind]

    @property
    def restarts(self) -> list[Event]:
        """The starts of the run after its first, but for planned ones."""
        return restarts(self.events)

    def events_of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["event"] == kind]

    def describe_incidents(self) -> str:
        """The incidents, as in "2 restarts, 1 rewind, 1 hang"; empty if nothing went wrong."""
        return describe_incidents(self.events, self.train)

    def progress(self) -> Progress:
        """How many images, hours and FLOPs each step took."""
        environment = self.environment
        batch, flops = environment["global_batch_size"], environment["training_flops_per_image"]
        return Progress.of_run(self.train, self.step, batch, flops)

    def describe_model(self) -> str:
        title = str(self.environment["model"])
        return title if re.match(r"R\d+x\d", title) else f"ViT {title}"  # a ResNet

    def describe_training(self) -> str:
        """The run in one clause, as in "840 steps of 64 images on 2 processes (cpu, ZeRO-1) in 1 min 12 s"."""
        environment, total = self.environment, self.environment["total_steps"]
        steps = counted(self.step, "step") if self.finished else f"{self.step:,} of {counted(total, 'step')}"
        images = f"of {environment['global_batch_size']:,} images"
        if self.events_of("batch_change") and self.train:
            images = f"with {self.train[-1]['samples']:,} images"
        return (
            f"{steps} {images} on {self.describe_processes()} "
            f"({environment['device']}, ZeRO-{environment['zero_stage']}) in {format_duration(self.seconds)}"
        )

    def describe_accuracy(self) -> list[str]:
        """A line for the weights as trained and one for their moving average, as far as either was evaluated."""
        lines = []
        for kind, prefix in (("eval", "top-1"), ("eval_ema", "top-1 of the EMA weights")):
            if rows := self.evaluations_of(kind):
                final, best = rows[-1], best_evaluation(rows)
                lines.append(
                    f"{prefix} {format_share(final['top1'])} on {counted(final['samples'], 'held-out image')}"
                    + (f" (best {format_share(best['top1'])} at step {best['step']:,})" if best is not final else "")
                )
            elif losses := self.losses_of(kind):
                last, weights = losses[-1], prefix.removeprefix("top-1")
                images = counted(last["samples"], "held-out image")
                lines.append(f"loss{weights} {last['loss']:.4g} on {images}")
        return lines

    def summary(self) -> str:
        """What was trained and how well, as the command line prints it."""
        model = f"{self.describe_model()} ({format_count(self.environment['parameters'])} parameters)"
        accuracy = self.describe_accuracy() or ["not evaluated yet"]
        incidents = [f"incidents: {text}"] if (text := self.describe_incidents()) else []
        state = [text] if (text := self.describe_state()) else []
        return "\n".join([f"{model}: {self.describe_training()}", *state, *accuracy, *incidents])


def best_evaluation(rows: list[EvalRow]) -> EvalRow:
    """The row of highest top-1; the latest of equals."""
    return max(reversed(rows), key=lambda row: row["top1"])


def load_run(source: Path | RunFolder, holder: Holder | None = None) -> RecordedRun:
    """Reads a run folder, without secrets of URLs. Raises UserError if it is none, or a file in it is damaged.

    One with a URL has been fetched to its path. holder: who works on the run.
    """
    folder = source if isinstance(source, RunFolder) else RunFolder(source)
    if not folder.path.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder that fastvit train wrote, such as runs/quickstart")
    missing = [file.name for file in (folder.environment, folder.metrics) if not file.is_file()]
    if missing:
        raise UserError(
            f"{folder} is not a run folder: it has no {missing[0]}; give the folder that fastvit train wrote"
        )
    environment = _read_environment(folder)
    metrics = read_all_metrics(folder.metrics, folder.describe(folder.metrics))
    return RecordedRun(
        folder=folder,
        environment=recorded(environment),
        **metrics._asdict(),
        events=recorded(read_events(folder)),
        samples=read_samples(folder) if folder.samples.is_file() else None,
        classes=read_classes(folder) if folder.classes.is_file() else None,
        reconstructions=read_reconstructions(folder) if folder.reconstructions.is_file() else None,
        inspected=read_inspected(folder),
        profiles=read_profiles(folder),
        config=without_secrets(folder.config.read_text(encoding="utf-8", errors="replace"))
        if folder.config.is_file()
        else None,
        holder=holder,
    )


def _read_environment(folder: RunFolder) -> dict[str, Any]:
    named = folder.describe(folder.environment)
    environment = read_json(folder.environment, named)
    problem = _problem(environment)
    if problem:
        raise UserError(f"{named} {problem}: it was not written by fastvit train, or is damaged")
    return dict(environment)


def _problem(environment: Any) -> str | None:
    """Why `environment` is not the record of a run's environment, or None if it is one."""
    if not isinstance(environment, dict):
        return "is not a JSON object"
    for key, kind in _ENVIRONMENT.items():
        if key not in environment:
            return f"lacks '{key}'"
        if not isinstance(environment[key], kind):
            return f"has {key} {environment[key]!r}"
        if isinstance(environment[key], int | float) and not abs(environment[key]) < _MOST:
            return f"has {key} {brief(environment[key])}"
    if environment["total_steps"] < 1:
        return f"has total_steps {environment['total_steps']}"
    try:
        datetime.fromisoformat(environment["started"])
    except ValueError:
        return f"has started {environment['started']!r}, not a time"
    return None
