"""Measuring the variants in turns, so that a slow moment of the machine hits all of them."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import torch

from benchmarks.data_loading.variants import Dataset, StageTimes, Variant
from fastvit_engine.data.check.speed import LoaderTime, time_loader
from fastvit_engine.errors import UserError
from fastvit_engine.storage.source import one_line

_LONGEST_REASON = 300  # characters


@dataclass
class Result:
    """One variant on one dataset; a number per round in each list."""

    dataset: str
    variant: str
    skipped: str | None = None  # why it has no figures
    failed: bool = False  # it is installed, and does not work here
    stages: list[StageTimes] = field(default_factory=list)  # CPU seconds an image
    loaders: dict[int, list[LoaderTime]] = field(default_factory=dict)  # by the number of workers

    def stage(self, name: str) -> float | None:
        """Median CPU seconds an image."""
        return median(getattr(times, name) for times in self.stages) if self.stages else None

    def cpu(self, workers: int) -> float:
        """Median CPU seconds an image in the whole loader."""
        return median(time.cpu / time.images for time in self.loaders[workers])

    def wall_rate(self, workers: int) -> float:
        return median(time.images / time.wall for time in self.loaders[workers])

    def speedup(self, over: "Result", workers: int) -> tuple[float, float, float]:
        """How many times as many images per CPU-second as `over` in the same round: median, lowest, highest."""
        pairs = zip(self.loaders[workers], over.loaders[workers], strict=True)
        ratios = [(b.cpu / b.images) / (a.cpu / a.images) for a, b in pairs]
        return median(ratios), min(ratios), max(ratios)


def measure(
    datasets: Sequence[Dataset],
    variants: Sequence[Variant],
    *,
    workers: int,
    rounds: int,
    images: int,
    progress: Callable[[str], None],
) -> list[Result]:
    """Every variant on every dataset: its stages, and its loader without and with workers.

    `images`: how many each of these takes a round, at least. First, every variant is checked on a whole epoch.
    A peer that is not installed or fails is left out, and its result says why. Raises UserError if this engine's own
    batches are wrong.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in workers
    try:
        results = [_check(dataset, variant, workers, progress) for dataset in datasets for variant in variants]
        turns = [
            (result, dataset, variant)
            for result, (dataset, variant) in zip(results, [(d, v) for d in datasets for v in variants], strict=True)
            if result.skipped is None
        ]
        start = time.perf_counter()
        for number in range(rounds):
            for at in range(len(turns)):
                result, dataset, variant = turns[(at + number) % len(turns)]
                if result.skipped is None:
                    with _named(result, variant, progress):
                        _turn(result, variant, dataset, workers, images)
            left = (time.perf_counter() - start) / (number + 1) * (rounds - number - 1)
            progress(f"round {number + 1} of {rounds}" + (f", {left:.0f} s left" if left else ""))
    finally:
        torch.set_num_threads(threads)
    return results


def _turn(result: Result, variant: Variant, dataset: Dataset, workers: int, images: int) -> None:
    if variant.stages:
        times = variant.stages(dataset, images)
        result.stages.append(StageTimes(*(seconds / images for seconds in times)))
    for count in sorted({0, workers}):
        result.loaders.setdefault(count, []).append(_run(variant, dataset, count, images))


@contextmanager
def _named(result: Result, variant: Variant, progress: Callable[[str], None]) -> Iterator[None]:
    """Takes a peer that fails out of the measurement, with the reason; this engine's own failures are raised."""
    try:
        yield
    except Exception as error:  # a peer may raise anything
        if not variant.packages:
            raise
        reason = one_line(error)
        if not isinstance(error, UserError) and reason != type(error).__name__:
            reason = f"{type(error).__name__}: {reason}"
        if len(reason) > _LONGEST_REASON:
            reason = f"{reason[:_LONGEST_REASON]}..."
        result.skipped, result.failed = f"failed: {reason}", True
        result.stages.clear()
        result.loaders.clear()
        progress(f"{variant.name} on {result.dataset} {result.skipped}")


def _check(dataset: Dataset, variant: Variant, workers: int, progress: Callable[[str], None]) -> Result:
    """A result without figures yet, or with the reason why there will be none."""
    result = Result(dataset.name, variant.name)
    with _named(result, variant, progress):
        result.skipped = variant.missing()
        if result.skipped is None:
            progress(f"checking {variant.name} on {dataset.name}")
            _check_epoch(dataset, variant, workers)
        else:
            progress(f"{variant.name}: {result.skipped}")
    return result


def _check_epoch(dataset: Dataset, variant: Variant, workers: int) -> None:
    """Raises UserError for batches of another shape, or an epoch with another number of samples."""
    seen = 0
    for images, labels in variant.batches(dataset, workers, False):
        seen += len(images)
        if tuple(images.shape[1:]) != variant.image_shape(dataset.image_size) or images.dtype != variant.dtype:
            raise UserError(f"{variant.name} gives images of {tuple(images.shape)}, {images.dtype}")
        if tuple(labels.shape) != (len(images),):
            raise UserError(f"{variant.name} gives labels of {tuple(labels.shape)} for {len(images)} images")
    if seen != dataset.samples if variant.exact else seen < dataset.samples:
        raise UserError(f"{variant.name} gives {seen:,} of the {dataset.samples:,} samples of {dataset.name}")


def _run(variant: Variant, dataset: Dataset, workers: int, images: int) -> LoaderTime:
    return time_loader(variant.batches(dataset, workers, True), images, prefetched=2 * workers + 2)
