"""Measures how many images a core decodes, and says how many cores a GPU needs at the speed that is expected of it."""

import io
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fastvit_engine.config import Config
from fastvit_engine.config.phases import possible_phases
from fastvit_engine.data.check.speed import stages_of
from fastvit_engine.data.pixels.draws import sample_seeds
from fastvit_engine.data.shards.sample import Sample
from fastvit_engine.data.shards.usable import SampleKeys
from fastvit_engine.doctor.findings import Finding, Group
from fastvit_engine.models import full_title, run_flops
from fastvit_engine.observe.units import counted, format_bytes, format_share
from fastvit_engine.sizing.gpus import DATASHEET_PEAK, matrix_peak

_group = Group("data")
_MFU = 0.4  # expected, as `fastvit plan` assumes
_SECONDS = 4.0  # of decoding, at most
_SIZE = (375, 500)  # pixels of generated images, as most of ImageNet's
_ANY_CLASS = 10_000_000  # the most that a model may have
_GPU = "H100"  # if there is none here, or one without a datasheet


@dataclass(frozen=True)
class Needs:
    """The GPUs of this node, which the data must feed, and the cores that do it."""

    gpu: str | None  # name of a GPU here; None on a machine without
    gpus: int
    cores: float


def expected_images_per_second(config: Config, gpu: str) -> float:
    """Of one GPU of this kind in training, at an MFU of 40 %, in the phase of the run whose images cost the least."""
    cheapest = min(run_flops(config, phase).computed for phase in possible_phases(config))
    return _MFU * matrix_peak(gpu, config.train.precision) / cheapest


def check_decoding(
    config: Config,
    samples: Iterator[Sample],
    needs: Needs,
    read_rate: float | None,
    *,
    generated: bool,
    classes_known: bool,
) -> Iterator[Finding]:
    """read_rate: bytes per second that the store gives one process; None if it is unknown."""
    classes = config.model.num_classes if classes_known else _ANY_CLASS
    reading = config.model_copy(update={"model": config.model.model_copy(update={"num_classes": classes})})
    keys, encoded, seen = SampleKeys.of(config.data), 0, 0
    deadline = time.monotonic() + _SECONDS

    def drawn() -> Iterator[tuple[Sample, np.ndarray]]:
        nonlocal encoded, seen
        for number, sample in enumerate(samples):
            if time.monotonic() > deadline:
                return
            seen += 1
            encoded += next((len(sample[name]) for name in keys.images if name in sample), 0)
            yield sample, sample_seeds(config.seed, 0, np.asarray([number]))

    seconds = [sum(cpu[1:]) for _, (cpu, _) in stages_of(reading, drawn())]  # without reading
    if not seconds:
        yield _group.problem(
            "decoding",
            f"none of {counted(seen, 'sample')} has a label and an image that training can use",
            "see what `fastvit data verify` says of the shards, with the same --recipe and --set",
        )
        return
    if len(seconds) < seen:
        yield _group.warning(
            "samples",
            f"{seen - len(seconds)} of the first {seen} have no label or image that training can use",
            "see what `fastvit data verify` says of the shards, with the same --recipe and --set",
        )
    per_core = len(seconds) / sum(seconds)
    what = f"generated JPEGs of {_SIZE[1]} x {_SIZE[0]} pixels" if generated else "the first images of the shards"
    size = encoded / seen
    yield _group.ok(
        "decoding",
        f"one core decodes and crops {per_core:,.0f} images/s ({what}, {format_bytes(size)} each)",
        figures={"images_per_second_per_core": per_core},
        speed="images_per_second_per_core",
    )
    known = next((name for name in DATASHEET_PEAK if needs.gpu is not None and name in needs.gpu), None)
    rate = expected_images_per_second(config, known or _GPU)
    yield _check_cores(config, known, rate, rate / per_core, needs)
    if read_rate is not None and not generated:
        yield _check_read_rate(rate * size, read_rate, needs)


def _check_cores(config: Config, known: str | None, rate: float, cores: float, needs: Needs) -> Finding:
    found = (
        f"one {known or _GPU} that trains {full_title(config.model)} at {format_share(_MFU)} MFU takes "
        f"{rate:,.0f} images/s: {cores:.1f} cores"
    )
    figures = {"images_per_second": rate, "cores": cores}
    if needs.gpus == 0:
        return _group.ok("cores per GPU", f"{found}; there is no GPU here", figures=figures)
    share = needs.cores / needs.gpus
    found += f" (here: {share:.1f} for each of {counted(needs.gpus, 'GPU')})"
    if share < cores:
        advice = "make smaller images (fastvit data make --resize 256), or ask for more cores per GPU"
        return _group.warning("cores per GPU", found, advice, figures=figures)
    return _group.ok("cores per GPU", found, figures=figures)


def _check_read_rate(per_gpu: float, rate: float, needs: Needs) -> Finding:
    """Each GPU has a process of its own that reads."""
    found = f"a GPU takes {format_bytes(per_gpu)}/s, and a process was given {format_bytes(rate)}/s"
    figures = {"bytes_per_second_per_gpu": per_gpu}
    if needs.gpus and rate < per_gpu:
        advice = "set data.cache to a local disk, or use a store that is nearer or faster"
        return _group.warning("reading per GPU", found, advice, figures=figures)
    return _group.ok("reading per GPU", found, figures=figures)


def generated_samples(count: int) -> Iterator[Sample]:
    """JPEGs of smooth random fields, which compress about as photos do."""
    random = np.random.default_rng(0)
    height, width = _SIZE
    encoded = []
    for _ in range(8):
        coarse = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        field = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
        grain = random.normal(0, 12, (height, width, 1)).astype(np.int16)
        buffer = io.BytesIO()
        Image.fromarray(np.clip(field + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    for number in range(count):
        yield {"__key__": f"generated-{number}", "__url__": "generated", "jpg": encoded[number % 8], "cls": b"0"}
