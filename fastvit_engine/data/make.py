"""`fastvit data make`: images to WebDataset shards, reproducible to the byte and never half-made."""

import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from webdataset.writer import TarWriter

from fastvit_engine.data.shards import INFO_NAME, DatasetInfo, SplitInfo, read_info
from fastvit_engine.data.sources import SourceImage, open_source
from fastvit_engine.errors import UserError

MARKER_NAME = "dataset.unfinished"  # in a folder that a run is filling: what is beside it may be removed
_REPORT_EVERY = 5.0  # seconds


@dataclass(frozen=True)
class MadeDataset:
    out: Path
    info: DatasetInfo
    already_made: bool


def make_dataset(
    source: str,
    out: Path,
    *,
    eval_fraction: float,
    samples_per_shard: int,
    seed: int,
    progress: Callable[[str], None] = print,
) -> MadeDataset:
    """Writes the images of `source` ('digits' or a folder of class folders) to train and eval shards in `out`.

    Every class gives the same share of its images to the eval split, within one image. Both splits are shuffled as a
    whole and cut into shards whose sizes differ by at most one. dataset.json is written last: a folder that has it is
    whole. With the same arguments again nothing is done. UserError on bad arguments, bad images and failed writes,
    after removing what this run has written.
    """
    if not 0 <= eval_fraction < 1:
        raise UserError(f"--eval-fraction is {eval_fraction}: it must be at least 0 and below 1")
    if samples_per_shard < 1:
        raise UserError(f"--samples-per-shard is {samples_per_shard}: it must be at least 1")
    name = source if source == "digits" else str(Path(source).expanduser().resolve())
    arguments: dict[str, Any] = {
        "source": name,
        "seed": seed,
        "eval_fraction": eval_fraction,
        "samples_per_shard": samples_per_shard,
    }
    made = read_info(out)
    if made is not None:
        _check_same(out, made, arguments)
        progress(f"{out} is already made: {made.train.samples:,} train and {made.eval.samples:,} eval samples")
        return MadeDataset(out, made, already_made=True)

    classes, images = open_source(name)
    rng = random.Random(seed)
    train, held_out = _split(images, eval_fraction, rng)
    if not train or (eval_fraction > 0 and not held_out):
        raise UserError(f"{len(images)} images are too few for --eval-fraction {eval_fraction}: change it")
    existed = out.exists()
    try:
        _prepare(out)
        report = _Progress(len(images), progress)
        splits = {
            split: SplitInfo(
                samples=len(members),
                shards={
                    f"{split}-{number:06d}.tar": _write_shard(out / f"{split}-{number:06d}.tar", shard, report)
                    for number, shard in enumerate(_balanced(members, samples_per_shard))
                },
            )
            for split, members in (("train", train), ("eval", held_out))
        }
        info = DatasetInfo(classes=classes, train=splits["train"], eval=splits["eval"], **arguments)
        _write_atomically(out / INFO_NAME, (info.model_dump_json(indent=2) + "\n").encode())
        (out / MARKER_NAME).unlink()
    except BaseException as error:
        _remove_unfinished(out, remove_folder=not existed)
        if isinstance(error, OSError):
            raise UserError(f"cannot write to {out} ({error.strerror}): make room or choose another --out") from error
        raise
    progress(
        f"{out}: {len(classes)} classes, {len(train):,} train samples in {len(info.train.shards)} shards, "
        f"{len(held_out):,} eval samples in {len(info.eval.shards)} shards"
    )
    return MadeDataset(out, info, already_made=False)


def _check_same(out: Path, made: DatasetInfo, arguments: dict[str, Any]) -> None:
    for key, value in arguments.items():
        before = getattr(made, key)
        if before != value:
            raise UserError(
                f"{out} was made with {key} {before}, not {value}: remove the folder or choose another --out"
            )


def _split(
    images: list[SourceImage], eval_fraction: float, rng: random.Random
) -> tuple[list[SourceImage], list[SourceImage]]:
    """Shuffled (train, eval) lists with every class's share of eval within one image of `eval_fraction`."""
    shuffled = rng.sample(images, len(images))
    by_class = sorted(shuffled, key=lambda image: image.label)  # stable: still shuffled within a class
    train: list[SourceImage] = []
    held_out: list[SourceImage] = []
    for index, image in enumerate(by_class):
        # Evenly spaced places in the class order: round(n * fraction) of them in any run of n.
        chosen = math.floor((index + 1) * eval_fraction + 0.5) > math.floor(index * eval_fraction + 0.5)
        (held_out if chosen else train).append(image)
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


def _balanced(images: list[SourceImage], samples_per_shard: int) -> Iterable[list[SourceImage]]:
    shards = math.ceil(len(images) / samples_per_shard)
    for number in range(shards):
        yield images[len(images) * number // shards : len(images) * (number + 1) // shards]


def _prepare(out: Path) -> None:
    """An empty folder `out` with the marker in it; what a killed run has left is removed, anything else refused."""
    if out.is_dir() and (out / MARKER_NAME).exists():
        _remove_unfinished(out, remove_folder=False)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise UserError(f"{out} is not empty and was not made by `fastvit data make`: choose another --out")
    (out / MARKER_NAME).touch()


def _remove_unfinished(out: Path, *, remove_folder: bool) -> None:
    if not (out / MARKER_NAME).exists():
        return
    if remove_folder:
        shutil.rmtree(out)
        return
    for pattern in ("train-*.tar", "eval-*.tar", "*.tmp", INFO_NAME, MARKER_NAME):  # the marker last
        for path in out.glob(pattern):
            path.unlink()


def _write_shard(path: Path, images: list[SourceImage], report: "_Progress") -> int:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        with TarWriter(file, user="fastvit", group="fastvit", mtime=0, encoder=False) as tar:
            for image in images:
                tar.write({"__key__": image.key, image.extension: image.read(), "cls": str(image.label).encode()})
                report.one_more()
        _sync(file)
    os.replace(temporary, path)
    return len(images)


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        _sync(file)
    os.replace(temporary, path)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class _Progress:
    """A line with rate and remaining time every few seconds."""

    def __init__(self, total: int, write: Callable[[str], None]) -> None:
        self.total, self.write, self.done = total, write, 0
        self.started = self.reported = time.monotonic()

    def one_more(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.reported >= _REPORT_EVERY:
            rate = self.done / (now - self.started)
            left = (self.total - self.done) / rate
            self.write(f"{self.done:,} of {self.total:,} images, {rate:,.0f} images/s, {left / 60:.1f} minutes left")
            self.reported = now
