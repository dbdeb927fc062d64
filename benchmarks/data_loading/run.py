"""`fastvit bench data` from its arguments to its files."""

import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.data_loading import variants
from benchmarks.data_loading.choices import Choice, measure_choices
from benchmarks.data_loading.dali import DALI
from benchmarks.data_loading.measure import Result, measure
from benchmarks.data_loading.nvjpeg import NVJPEG
from benchmarks.data_loading.report import BASELINE, draw, to_markdown
from benchmarks.data_loading.shards import read_photos
from benchmarks.data_loading.spdl import SPDL
from benchmarks.data_loading.variants import Dataset, open_dataset
from fastvit_engine.data.check.speed import link_shards, naming_linked_shards, repack_shards
from fastvit_engine.data.shards.usable import SampleKeys
from fastvit_engine.files import atomic_write
from fastvit_engine.observe.environment import collect_environment

VARIANTS = (*variants.VARIANTS, NVJPEG, DALI, SPDL)
_PACKAGES = (
    "pillow",
    "simplejpeg",
    "opencv-python-headless",
    "timm",
    "torchvision",
    *(f"nvidia-dali-cuda{cuda}" for cuda in (110, 120, 130)),  # one at most
    "spdl",
)


class Effort(NamedTuple):
    """How long to measure."""

    rounds: int
    images: int  # that each measurement of a round takes, at least
    photos: int  # for decoders and ways to resize
    batch_size: int


FULL = Effort(rounds=9, images=640, photos=300, batch_size=64)
QUICK = Effort(rounds=2, images=64, photos=32, batch_size=16)


def bench(
    pattern: str,
    *,
    image_size: int,
    workers: int,
    effort: Effort,
    repack: int | None = None,
    out: Path | None = None,
    progress: Callable[[str], None],
) -> tuple[str, dict[str, Any]]:
    """Measures on the shards and, with `repack`, on the same images with that short side.

    Returns the report in Markdown and everything that was measured; with `out`, both are written there beside a
    picture, as data_bench.md, .json and .png. Raises UserError for shards that cannot be trained on.
    """
    environment = _environment()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        links = folder / "as-they-are"
        link_shards(pattern, links)
        with naming_linked_shards(links):
            datasets = [_open("as they are", links, image_size, effort)]
            if repack:
                progress(f"making the images smaller: short side {repack}")
                keys = SampleKeys.of(datasets[0].config.data)
                repack_shards(links, folder / "repacked", repack, keys)
                datasets.append(_open(f"short side {repack}", folder / "repacked", image_size, effort))
            results = measure(
                datasets, VARIANTS, workers=workers, rounds=effort.rounds, images=effort.images, progress=progress
            )
        choices: list[Choice] = []
        for dataset in datasets:
            if photos := read_photos(dataset.shards, effort.photos):
                progress(f"decoders and ways to resize, {dataset.name}")
                choices += measure_choices(dataset.name, photos, image_size, effort.rounds)
        text = to_markdown(datasets, VARIANTS, results, choices, workers=workers, environment=environment)
        record = _record(datasets, results, choices, workers, environment)
        if out:
            out.mkdir(parents=True, exist_ok=True)
            atomic_write(out / "data_bench.md", text)
            atomic_write(out / "data_bench.json", json.dumps(record, indent=1) + "\n")
            draw(out / "data_bench.png", datasets, results, workers)
    return text, record


def _open(name: str, folder: Path, image_size: int, effort: Effort) -> Dataset:
    return open_dataset(name, str(folder), image_size, effort.batch_size, folder)


def _environment() -> dict[str, Any]:
    with open("/proc/cpuinfo") as file:
        cpu = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "unknown CPU")
    found = collect_environment(cpu=cpu, load_average=os.getloadavg()[0])
    found.pop("hostname")
    return found | {"versions": found["versions"] | {package: _version(package) for package in _PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _record(
    datasets: list[Dataset], results: list[Result], choices: list[Choice], workers: int, environment: dict[str, Any]
) -> dict[str, Any]:
    """Plain numbers: the summary, and every round."""
    baselines = {result.dataset: result for result in results if result.variant == BASELINE}
    rows = []
    for result in results:
        row: dict[str, Any] = {"dataset": result.dataset, "variant": result.variant}
        row |= {"skipped": result.skipped, "failed": result.failed}
        if not result.skipped:
            row["images_per_cpu_second"] = {count: 1 / result.cpu(count) for count in result.loaders}
            row["images_per_second"] = {count: result.wall_rate(count) for count in result.loaders}
            baseline = baselines[result.dataset]
            row["over_recipe"] = None if baseline.skipped else result.speedup(baseline, workers)[0]
            row["stages"] = [times._asdict() for times in result.stages]
            row["loaders"] = {count: [times._asdict() for times in each] for count, each in result.loaders.items()}
        rows.append(row)
    return {
        "environment": environment,
        "workers": workers,
        "datasets": [
            {"name": d.name, "samples": d.samples, "image_size": d.image_size, "batch_size": d.batch_size}
            for d in datasets
        ],
        "results": rows,
        "choices": [choice._asdict() for choice in choices],
    }
