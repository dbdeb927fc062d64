"""`fastvit data bench`: how fast shards become training batches, stage by stage and as a whole loader."""

import gc
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from webdataset.writer import TarWriter

from fastvit_engine.config import Config
from fastvit_engine.data.build.encode import encode_jpeg
from fastvit_engine.data.pixels.decode import decode_image, open_image
from fastvit_engine.data.pixels.draws import sample_seeds
from fastvit_engine.data.pixels.views import (
    choose_views,
    decode_views,
    draw_views,
    images_shape,
    render_views,
    training_views,
)
from fastvit_engine.data.shards.archive import read_shard
from fastvit_engine.data.shards.names import is_local, list_shards
from fastvit_engine.data.shards.sample import Sample
from fastvit_engine.data.shards.usable import SampleKeys, Unusable, read_image, read_labels
from fastvit_engine.data.stream.batch import BadSample, StageSeconds, Workspace
from fastvit_engine.data.stream.indexed import IndexedData, open_train_samples
from fastvit_engine.data.stream.prepare import prepare_data
from fastvit_engine.data.stream.sequential import stream_samples
from fastvit_engine.data.stream.source import TrainingData
from fastvit_engine.data.stream.streams import StreamData
from fastvit_engine.errors import UserError
from fastvit_engine.shown import recorded

MOST_BYTES = 1 << 28  # of local shards: what the page cache holds, so that the disk is not what is measured
_TICKS = os.sysconf("SC_CLK_TCK")  # of /proc/<pid>/stat, per second
_BATCH = 64  # if train.micro_batch_size is not set
_STAGES = {"read": "read, parse labels", "decode": "decode", "augment": "crop, resize, mirror"}


class Effort(NamedTuple):
    """How long to measure."""

    rounds: int
    images: int  # that each measurement of a round takes, at least


FULL, QUICK = Effort(rounds=5, images=640), Effort(rounds=2, images=64)


# ---- measuring


class LoaderTime(NamedTuple):
    """A loader in full swing."""

    images: int
    cpu: float  # seconds, of this process and its workers
    wall: float


class StageTimes(NamedTuple):
    """What the stages took for the same number of images, one after the other in one process, without batches."""

    images: int
    cpu: StageSeconds
    wall: StageSeconds


def time_loader(batches: Iterator[Any], images: int, *, prefetched: int) -> LoaderTime:
    """Times `images` images, at least, of an endless generator of (images, ...), after the first `prefetched` batches.

    The generator is closed, and its worker processes have ended, when this returns.
    """
    before = set(multiprocessing.active_children())
    for _ in range(prefetched):
        next(batches)
    processes = [process for process in multiprocessing.active_children() if process not in before]
    cpu, wall, seen = _cpu_seconds(processes), time.perf_counter(), 0
    while seen < images:
        seen += len(next(batches)[0])
    taken = LoaderTime(seen, _cpu_seconds(processes) - cpu, time.perf_counter() - wall)
    batches.close()  # type: ignore[attr-defined]  # a generator
    del batches
    gc.collect()
    for process in processes:
        process.join(10)
    return taken


def _cpu_seconds(processes: Sequence[multiprocessing.process.BaseProcess]) -> float:
    """Of this process and others, so far."""
    total = time.process_time()
    for process in processes:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / _TICKS  # user and system time, fields 14 and 15 of `man proc`
    return total


def time_stages(config: Config, data: TrainingData, images: int) -> StageTimes:
    """Times the stages of the first `images` images of a run."""
    seconds = [times for _, times in stages(config, data, images)]
    cpu, wall = (StageSeconds(*np.sum(each, axis=0).tolist()) for each in zip(*seconds, strict=True))
    return StageTimes(len(seconds), cpu, wall)


def stages(
    config: Config, data: TrainingData, images: int
) -> Iterator[tuple[np.ndarray, tuple[StageSeconds, StageSeconds]]]:
    """The first images of a run (uint8 of `images_shape`, until the next), each with its (CPU, wall) seconds."""
    yield from stages_of(config, _samples(config, data, images))


def stages_of(
    config: Config, samples: Iterable[tuple[Sample, np.ndarray]]
) -> Iterator[tuple[np.ndarray, tuple[StageSeconds, StageSeconds]]]:
    """As `stages`, of samples with their seeds, int64 [1] each.

    It is what a worker does, one image after the other. A sample without a usable image is left out.
    """
    workspace, keys, views = Workspace(), SampleKeys.of(config.data), training_views(config)
    out, sizes = np.empty(images_shape(views), np.uint8), [view.size for view in views]
    marks = [_now()]
    for sample, seeds in samples:
        try:
            read_labels(sample, keys, config.model.num_classes)
            marks.append(_now())
            image = read_image(sample, keys, partial(open_image, max_pixels=keys.max_pixels))
            chosen = choose_views(image.height, image.width, views, draw_views(seeds, views)[0])
            decoded = decode_views(image, chosen, workspace.decoded)
        except (Unusable, ValueError):
            marks = [_now()]
            continue
        marks.append(_now())
        render_views(decoded, chosen, sizes, out, workspace.resized)
        marks.append(_now())
        cpu, wall = (StageSeconds(*np.diff(clock).tolist()) for clock in zip(*marks, strict=True))
        yield out, (cpu, wall)
        marks = [_now()]


def _now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def _samples(config: Config, data: TrainingData, count: int) -> Iterator[tuple[Sample, np.ndarray]]:
    """The first samples of a run, with their seeds."""
    if isinstance(data, IndexedData):
        samples = open_train_samples(config, data)
        for start in range(0, count, _BATCH):
            located = samples.order.locate(np.arange(start, min(count, start + _BATCH)))
            seeds = sample_seeds(config.seed, located.source, located.epoch, located.position)
            for row, sample in enumerate(samples.read(located)):
                if not isinstance(sample, BadSample):
                    yield sample, seeds[row : row + 1]
    else:
        assert isinstance(data, StreamData)
        options: dict[str, Any] = {"seed": config.seed, "stream": 0, "shuffle_buffer": config.data.shuffle_buffer}
        for index, sample in islice(stream_samples(list(data.train), **options), count):
            yield sample, sample_seeds(config.seed, 0, index)


# ---- shards to measure on


def link_shards(pattern: str, folder: Path) -> None:
    """Fills a new folder with links to the first local shards of a pattern, so that nothing is written beside them."""
    folder.mkdir()
    total = 0
    for number, shard in enumerate(list_shards([pattern], named="SHARDS")):
        if not is_local(shard):
            raise UserError(f"shard {shard} is not local: copy some shards to a local disk to measure on")
        total += Path(shard).stat().st_size
        if number and total > MOST_BYTES:
            break
        (folder / f"{number:06d}-{Path(shard).name}").symlink_to(Path(shard).resolve())


@contextmanager
def naming_linked_shards(folder: Path) -> Iterator[None]:
    """Errors inside name the shards that the links in `folder` lead to, which people know, and not the links."""
    try:
        yield
    except UserError as error:
        sentence = str(error)
        for link in folder.iterdir() if folder.is_dir() else ():
            if link.is_symlink():
                sentence = sentence.replace(str(link), str(link.resolve()))
        raise UserError(sentence) from error


def repack_shards(source: Path, folder: Path, short_side: int, keys: SampleKeys) -> None:
    """Writes the samples again with images of at most this short side in pixels, as JPEG of quality 90."""
    folder.mkdir()
    for shard in sorted(path for path in source.iterdir() if path.is_symlink()):
        path = folder / f"{shard.name.partition('.')[0]}.tar"
        with TarWriter(str(path), mtime=0) as tar:  # as `fastvit data make`: fractions of seconds take a second header
            for sample in read_shard(str(shard)):
                members = {name: value for name, value in sample.items() if name == "__key__" or name[:2] != "__"}
                name = next((name for name in keys.images if name in members), None)
                if name is not None:
                    tar.write({**members, name: _shrink(members[name], short_side, keys.max_pixels)})


def _shrink(data: bytes, short_side: int, max_pixels: int) -> bytes:
    try:
        image = Image.fromarray(decode_image(data, max_pixels))
    except ValueError:
        return data
    scale = short_side / min(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    return encode_jpeg(image, quality=90)


# ---- the command


@dataclass
class ShardSpeed:
    """What was measured on one set of shards; an entry per round in each list."""

    name: str
    image_size: int
    batch_size: int
    stages: list[StageTimes]
    loaders: dict[int, list[LoaderTime]]  # by the number of workers

    def stage_rate(self, stage: str, clock: str) -> float:
        """Images per second of CPU time or of the clock ("cpu", "wall"), the median of the rounds."""
        return median(times.images / getattr(getattr(times, clock), stage) for times in self.stages)

    def loader_rate(self, workers: int, clock: str) -> float:
        return median(times.images / getattr(times, clock) for times in self.loaders[workers])

    def slowest(self) -> str:
        return min(_STAGES, key=lambda stage: self.stage_rate(stage, "wall"))

    def rows(self) -> list[tuple[str, float, float]]:
        """Rows of (what, images per CPU-second, images per second)."""
        stage, loader = self.stage_rate, self.loader_rate
        found = [(title, stage(name, "cpu"), stage(name, "wall")) for name, title in _STAGES.items()]
        return found + [(f"loader, {n} workers", loader(n, "cpu"), loader(n, "wall")) for n in self.loaders]

    def report(self) -> str:
        lines = [
            f"{self.name}: batches of {self.batch_size} at {self.image_size} pixels",
            "",
            f"{'':<24}{'images per CPU-second':>24}{'images per second':>20}",
            *(f"{what:<24}{cpu:>24,.0f}{wall:>20,.0f}" for what, cpu, wall in self.rows()),
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {
            "shards": self.name,
            "image_size": self.image_size,
            "batch_size": self.batch_size,
            "slowest_stage": self.slowest(),
            "images_per_cpu_second": {what: cpu for what, cpu, _ in self.rows()},
            "images_per_second": {what: wall for what, _, wall in self.rows()},
            "rounds": len(self.stages),
        }


def measure_speed(
    argument: str,
    config: Config,
    *,
    workers: int | None = None,
    effort: Effort = FULL,
    repack: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[ShardSpeed]:
    """Measures the shards that `argument` names under a configuration and, with `repack`, smaller copies of them.

    `workers`: processes of the loader; None: data.num_workers. Local shards are read from the page cache, up to
    MOST_BYTES of them, and nothing is written beside them; remote ones are read as training reads them. Raises
    UserError for shards that cannot be trained on.
    """
    workers = config.data.workers if workers is None else workers
    with tempfile.TemporaryDirectory() as scratch:
        folder, pattern = Path(scratch), argument
        links = folder / "as-they-are"
        if all(is_local(shard) for shard in list_shards([argument], named="SHARDS")):
            link_shards(argument, links)
            pattern = str(links)
        found = [(argument, pattern)]
        with naming_linked_shards(links):
            if repack is not None:
                if pattern == argument:
                    raise UserError("--repack needs local shards: copy some to a local disk to measure on")
                progress(f"making the images smaller: short side {repack}")
                repack_shards(links, folder / "repacked", repack, SampleKeys.of(config.data))
                found.append((f"{argument}, short side {repack}", str(folder / "repacked")))
            return [_measure(name, shards, config, workers, effort, folder, progress) for name, shards in found]


def _measure(
    name: str, shards: str, config: Config, workers: int, effort: Effort, folder: Path, progress: Callable[[str], None]
) -> ShardSpeed:
    batch_size = config.train.micro_batch_size or _BATCH
    train = config.train.model_copy(update={"global_batch_size": batch_size})
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"train": shards, "eval": None}), "train": train}
    )
    speed = ShardSpeed(name, config.model.image_size, batch_size, [], {count: [] for count in sorted({0, workers})})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in workers
    try:
        for number in range(effort.rounds):
            for count, times in speed.loaders.items():
                settings = config.model_copy(
                    update={"data": config.data.model_copy(update={"num_workers": count, "streams": None})}
                )
                data = prepare_data(settings, world_size=1, index_folder=folder)
                batches = data.train_batches(
                    settings, rank=0, world_size=1, micro_batch_size=batch_size, consumed=0, pin_memory=False
                )
                times.append(time_loader(batches, effort.images, prefetched=2 * count + 2))
                if count == 0:
                    speed.stages.append(time_stages(settings, data, effort.images))
            progress(f"{name}: round {number + 1} of {effort.rounds}")
    finally:
        torch.set_num_threads(threads)
    return speed


def report(speeds: Sequence[ShardSpeed]) -> str:
    """All that was measured, and what to do about the slowest stage."""
    first = speeds[0]
    lines = [speed.report() for speed in speeds]
    advice = {
        "read": "the disk, the network or data.cache",
        "decode": "the size of the images (--repack N measures smaller ones; data make --resize N makes them)",
        "augment": "model.image_size",
    }[first.slowest()]
    lines.append(
        f"The slowest stage is '{_STAGES[first.slowest()]}': it depends on {advice}. The stages are measured one image "
        "after the other in one process; mixup, CutMix, RandAugment and normalisation are the training device's work."
    )
    return "\n\n".join(lines)


def to_json(speeds: Sequence[ShardSpeed]) -> str:
    return json.dumps([recorded(speed.to_dict()) for speed in speeds], indent=2)
