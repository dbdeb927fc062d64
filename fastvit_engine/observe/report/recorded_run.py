"""Reads a run back from its folder, finished or not, and sums it up in sentences."""

import base64
import binascii
import json
import math
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fastvit_engine.errors import UserError
from fastvit_engine.observe.events import Event, read_events
from fastvit_engine.observe.metrics import EvalRow, FewShotRow, TrainRow, read_all_metrics
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.observe.units import counted, format_count, format_duration, format_share
from fastvit_engine.shown import recorded, without_secrets

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
# Kinds of events that tell of trouble: in the singular and in the plural. Restarts are counted by the starts.
_INCIDENTS = {
    "rewind": ("rewind", "rewinds"),
    "anomaly": ("anomaly", "anomalies"),
    "failure": ("failure", "failures"),
    "hang": ("hang", "hangs"),
    "slow_rank": ("slow rank", "slow ranks"),
    "checkpoint_failed": ("failed checkpoint", "failed checkpoints"),
}
_PNG = re.compile(r"data:image/png;base64,([A-Za-z0-9+/]+={0,2})")


@dataclass(frozen=True)
class Sample:
    """An evaluation image and what the model predicted."""

    key: str
    label: int
    image: str  # data URL of a PNG
    width: int  # pixels
    predictions: list[tuple[int, float]]  # class index and probability, the most probable first

    @property
    def correct(self) -> bool:
        return bool(self.predictions) and self.predictions[0][0] == self.label


@dataclass(frozen=True)
class Samples:
    """Images of the evaluation set, and what the model says of them."""

    step: int
    class_names: list[str] | None
    samples: list[Sample]

    def class_name(self, index: int) -> str:
        known = self.class_names is not None and 0 <= index < len(self.class_names)
        return self.class_names[index] if known and self.class_names else f"class {index}"


@dataclass(frozen=True)
class RecordedRun:
    """The content of a run folder, in memory."""

    folder: RunFolder
    environment: dict[str, Any]
    train: list[TrainRow]
    evaluations: list[EvalRow]
    few_shot: list[FewShotRow]
    events: list[Event]
    samples: Samples | None
    config: str | None  # YAML text

    @property
    def step(self) -> int:
        """The last step known to be done."""
        last = [*self.train[-1:], *self.evaluations[-1:], *self.few_shot[-1:]]
        return max((row["step"] for row in last), default=0)

    @property
    def finished(self) -> bool:
        return self.step >= self.environment["total_steps"]

    @property
    def seconds(self) -> float:
        """Training time over all restarts."""
        return self.train[-1]["seconds"] if self.train else 0.0

    def evaluations_of(self, kind: str) -> list[EvalRow]:
        """`kind` is "eval" or "eval_ema"."""
        return [row for row in self.evaluations if row["eval"] == kind]

    @property
    def restarts(self) -> list[Event]:
        """The starts of the run after its first, but for those that made it longer when it was done."""
        starts = self.events_of("start")
        pairs = zip(starts, starts[1:], strict=False)
        return [event for before, event in pairs if event.get("step") != before.get("total_steps", math.nan)]

    def events_of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["event"] == kind]

    def describe_incidents(self) -> str:
        """The incidents, as in "2 restarts, 1 rewind, 1 hang"; empty if nothing went wrong."""
        counts = {"restart": len(self.restarts), **{kind: len(self.events_of(kind)) for kind in _INCIDENTS}}
        return ", ".join(
            f"{count:,} {_INCIDENTS.get(kind, (kind, kind + 's'))[count != 1]}"
            for kind, count in counts.items()
            if count
        )

    def describe_model(self) -> str:
        return f"ViT {self.environment['model']}"

    def describe_training(self) -> str:
        """The run in one clause, as in "840 steps of 64 images on 2 processes (cpu, ZeRO-1) in 1 min 12 s"."""
        environment, total = self.environment, self.environment["total_steps"]
        steps = counted(self.step, "step") if self.finished else f"{self.step:,} of {counted(total, 'step')}"
        processes = counted(environment["world_size"], "process", "processes")
        images = f"of {environment['global_batch_size']:,} images"
        if self.events_of("batch_change") and self.train:
            images = f"with {self.train[-1]['samples']:,} images"
        return (
            f"{steps} {images} on {processes} "
            f"({environment['device']}, ZeRO-{environment['zero_stage']}) in {format_duration(self.seconds)}"
        )

    def describe_accuracy(self) -> list[str]:
        """One line for the weights as trained and one for their moving average, as far as either was evaluated."""
        lines = []
        for kind, prefix in (("eval", "top-1"), ("eval_ema", "top-1 of the EMA weights")):
            if rows := self.evaluations_of(kind):
                final, best = rows[-1], best_evaluation(rows)
                lines.append(
                    f"{prefix} {format_share(final['top1'])} on {counted(final['samples'], 'held-out image')}"
                    + (f" (best {format_share(best['top1'])} at step {best['step']:,})" if best is not final else "")
                )
        return lines

    def summary(self) -> str:
        """What was trained and how well, as the command line prints it."""
        model = f"{self.describe_model()} ({format_count(self.environment['parameters'])} parameters)"
        accuracy = self.describe_accuracy() or ["not evaluated yet"]
        incidents = [f"incidents: {text}"] if (text := self.describe_incidents()) else []
        return "\n".join([f"{model}: {self.describe_training()}", *accuracy, *incidents])


def best_evaluation(rows: list[EvalRow]) -> EvalRow:
    """The row of highest top-1; the latest of equals."""
    return max(reversed(rows), key=lambda row: row["top1"])


def load_run(source: Path | RunFolder) -> RecordedRun:
    """Reads a run folder, without secrets of URLs. Raises UserError if it is none, or a file in it is damaged.

    One with a URL has been fetched to its path.
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
    train, evaluations, few_shot = read_all_metrics(folder.metrics, folder.describe(folder.metrics))
    return RecordedRun(
        folder=folder,
        environment=recorded(environment),
        train=train,
        evaluations=evaluations,
        few_shot=few_shot,
        events=recorded(read_events(folder)),
        samples=_read_samples(folder) if folder.samples.is_file() else None,
        config=without_secrets(folder.config.read_text(encoding="utf-8", errors="replace"))
        if folder.config.is_file()
        else None,
    )


def _read_json(path: Path, named: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{named} is not valid JSON: the file is damaged") from error


def _read_environment(folder: RunFolder) -> dict[str, Any]:
    named = folder.describe(folder.environment)
    environment = _read_json(folder.environment, named)
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
    if environment["total_steps"] < 1:
        return f"has total_steps {environment['total_steps']}"
    try:
        datetime.fromisoformat(environment["started"])
    except ValueError:
        return f"has started {environment['started']!r}, not a time"
    return None


def _read_samples(folder: RunFolder) -> Samples:
    named = folder.describe(folder.samples)
    content = _read_json(folder.samples, named)
    try:
        return Samples(
            step=int(content["step"]),
            class_names=None if content["class_names"] is None else [str(name) for name in content["class_names"]],
            samples=[
                Sample(
                    key=str(sample["key"]),
                    label=int(sample["label"]),
                    image=sample["image"],
                    width=_png_width(sample["image"]),
                    predictions=[(int(index), float(probability)) for index, probability in sample["predictions"]],
                )
                for sample in content["samples"]
            ],
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        problem = f"does not hold sample predictions ({error!r})"
        raise UserError(f"{named} {problem}: remove it, or evaluate again") from error


def _png_width(url: str) -> int:
    """Width in pixels of a PNG in a data URL. ValueError for any other URL: a report must not refer to other files."""
    match = _PNG.fullmatch(url)
    if match is None:
        raise ValueError("an image is not a PNG in a data URL")
    try:
        header = base64.b64decode(match[1][:32])  # 8 bytes signature, 4 length, 4 "IHDR", 4 width
    except binascii.Error as error:
        raise ValueError("an image is not valid base64") from error
    if header[:8] != b"\x89PNG\r\n\x1a\n" or header[12:16] != b"IHDR":
        raise ValueError("an image is not a PNG")
    return int.from_bytes(header[16:20], "big")
