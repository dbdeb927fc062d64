"""The results as a table in Markdown and as a picture of where the time goes."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks.data_loading.choices import Choice
from benchmarks.data_loading.measure import Result
from benchmarks.data_loading.variants import Dataset, Variant
from fastvit_engine.files import atomic_write

_STAGES = {"read": "read", "decode": "decode", "crop": "crop, resize, mirror", "to_float": "to float, normalise"}
BASELINE = "wds + PIL"


def to_markdown(
    datasets: Sequence[Dataset],
    variants: Sequence[Variant],
    results: Sequence[Result],
    choices: Sequence[Choice],
    *,
    workers: int,
    environment: dict[str, Any],
) -> str:
    """Titles, versions, a table a dataset, and the choices of decoders and ways to resize."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    machine = f"{environment['cpu']}, {environment['cpu_count']} cores, load average {environment['load_average']:.2f}"
    lines = [
        "# Data loading",
        "",
        f"`{environment['command']}`, {environment['started']}: {machine} at the start. {versions}.",
        "",
        "Images per CPU-second: CPU time of the main process and its workers together, so that other programs on the "
        "machine matter little; medians over the rounds. A stage alone is one image after the other in one process. "
        f"The last columns are whole loaders: without workers, and with {workers}; of the latter also images per "
        "second by the clock, and how many times as many images per CPU-second it gives as the usual recipe in the "
        "same round (median, lowest and highest).",
        "",
        *(f"* `{variant.name}`: {variant.title}" for variant in variants),
    ]
    for dataset in datasets:
        lines += ["", f"## {dataset.name}", "", _describe(dataset), "", *_table(dataset.name, results, workers)]
    for name in dict.fromkeys(choice.dataset for choice in choices):
        lines += ["", f"## Decoding and resizing: {name}", "", *_choices(name, choices)]
    return "\n".join(lines) + "\n"


def _describe(dataset: Dataset) -> str:
    size = sum(Path(shard).stat().st_size for shard in dataset.shards) / dataset.samples / 1000
    return (
        f"{dataset.samples:,} samples of {size:.0f} kB in {len(dataset.shards)} shard(s); batches of "
        f"{dataset.batch_size} at {dataset.image_size} pixels."
    )


def _table(dataset: str, results: Sequence[Result], workers: int) -> list[str]:
    own = [result for result in results if result.dataset == dataset]
    baseline = next(result for result in own if result.variant == BASELINE)
    counts = sorted({0, workers})
    head = ["variant", *_STAGES.values(), *(f"{count} workers" for count in counts), "by the clock", "over the recipe"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for result in own:
        if result.skipped:
            lines.append(f"| {result.variant} | {result.skipped} |" + " |" * (len(head) - 2))
            continue
        cells = [_rate(result.stage(stage)) for stage in _STAGES]
        cells += [_rate(result.cpu(count)) for count in counts] + [f"{result.wall_rate(workers):,.0f}"]
        if baseline.skipped:
            cells.append("")
        else:
            middle, lowest, highest = result.speedup(baseline, workers)
            cells.append(f"**{middle:.2f}** ({lowest:.2f} to {highest:.2f})")
        lines.append(f"| {result.variant} | " + " | ".join(cells) + " |")
    return lines


def _choices(dataset: str, choices: Sequence[Choice]) -> list[str]:
    lines = [
        "What is in bold is used. PSNR is against accurate decoding, over the images that differ: mean and lowest.",
        "",
        "| stage | how | µs | images per CPU-second | PSNR, dB |",
        "|---|---|---:|---:|---:|",
    ]
    for choice in choices:
        if choice.dataset == dataset:
            quality = f"{choice.psnr[0]:.1f}, {choice.psnr[1]:.1f}" if choice.psnr else ""
            name = f"**{choice.name}**" if choice.chosen else choice.name
            lines.append(
                f"| {choice.stage} | {name} | {1e6 * choice.seconds:,.0f} | {1 / choice.seconds:,.0f} | {quality} |"
            )
    return lines


def _rate(seconds: float | None) -> str:
    return f"{1 / seconds:,.0f}" if seconds else ""


# ---- the picture

# The report's colours on paper, one a stage.
_COLOURS = {
    "read": "#62666e",
    "decode": "#2a6fdb",
    "crop": "#0f8a68",
    "to_float": "#c8590b",
    "rest": "#c9c4ba",
    "whole": "#e5e2dc",
}
_LABELS = {**_STAGES, "rest": "batches and processes", "whole": "not told apart"}
_INK, _SOFT, _PAGE, _HAIR = "#1b1d21", "#62666e", "#fbfaf8", "#e5e2dc"
_SCALE = 2  # pixels a unit below


def draw(path: Path, datasets: Sequence[Dataset], results: Sequence[Result], workers: int) -> None:
    """A stacked bar per variant: microseconds of CPU an image, by stage, in a loader with `workers` workers."""
    bars = [[result for result in results if result.dataset == dataset.name] for dataset in datasets]
    width, left, right, bar, gap = 900, 150, 130, 24, 12
    height = 96 + sum(46 + len(own) * (bar + gap) for own in bars)
    image = Image.new("RGB", (width * _SCALE, height * _SCALE), _PAGE)
    canvas = ImageDraw.Draw(image)
    largest = max(result.cpu(workers) for own in bars for result in own if not result.skipped)

    def text(x: float, y: float, words: str, size: int = 13, colour: str = _INK, anchor: str = "lm") -> None:
        canvas.text((x * _SCALE, y * _SCALE), words, colour, ImageFont.load_default(size * _SCALE), anchor)

    def box(x0: float, y0: float, x1: float, y1: float, colour: str) -> None:
        canvas.rectangle((x0 * _SCALE, y0 * _SCALE, x1 * _SCALE, y1 * _SCALE), fill=colour)

    text(20, 26, f"CPU time of one image, {workers} workers", 18)
    x = 20.0
    for stage, label in _LABELS.items():
        box(x, 54, x + 12, 66, _COLOURS[stage])
        text(x + 18, 60, label, 12, _SOFT)
        x += 34 + canvas.textlength(label, ImageFont.load_default(12 * _SCALE)) / _SCALE
    y = 96.0
    for dataset, own in zip(datasets, bars, strict=True):
        text(20, y, dataset.name, 14)
        y += 18
        for result in own:
            text(left - 10, y + bar / 2, result.variant, 13, _INK, "rm")
            if result.skipped:
                text(left, y + bar / 2, result.skipped, 12, _SOFT)
                y += bar + gap
                continue
            x = left
            for stage, seconds in _parts(result, workers).items():
                end = x + (width - left - right) * seconds / largest
                box(x, y, end, y + bar, _COLOURS[stage])
                x = end
            per_image = result.cpu(workers)
            text(x + 8, y + bar / 2, f"{1e3 * per_image:,.2f} ms", 13)
            text(x + 72, y + bar / 2, f"{1 / per_image:,.0f}/s", 12, _SOFT)
            y += bar + gap
        canvas.line((20 * _SCALE, y * _SCALE, (width - 20) * _SCALE, y * _SCALE), _HAIR, _SCALE)
        y += 28
    atomic_write(path, _png(image))


def _parts(result: Result, workers: int) -> dict[str, float]:
    """Seconds of each stage; what the whole takes beyond them comes last."""
    if not result.stages:
        return {"whole": result.cpu(workers)}
    stages = {stage: seconds for stage in _STAGES if (seconds := result.stage(stage))}
    return {**stages, "rest": max(0.0, result.cpu(workers) - sum(stages.values()))}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
