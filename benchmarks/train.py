"""Measures whole training steps (forward, backward, optimizer), ours and those of peers, each in its own process.

Every variant starts from the same weights and must first follow the losses of plain timm in float32 for a few steps;
one that does not is shown as wrong, without a ratio. The first variant is measured again at the end: its
difference from itself is the noise of this machine.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import pick_known
from benchmarks.machine import ROOT, describe, pick_device
from benchmarks.shapes import CPU_SHAPES, GPU_SHAPES, Shape
from benchmarks.train_variants import REFERENCE, VARIANTS, Variant
from fastvit_engine.distributed.supervise import start_ranks

# Relative distance that a loss of the first steps may have. Rounding of weights in bf16 is 2^-8, and Adam turns signs.
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
QUICK_CPU_SHAPE = Shape("tiny/16@64", 16, 64, 96, 2, 384, 3, (16,))
SHARDS_VARIANTS = ("fastvit", "fastvit ZeRO-1", "timm compile")  # measured from shards too
CONTROL = "control"
TIME_LIMIT = 1200  # seconds for one variant


@dataclass(frozen=True)
class Selection:
    """What to measure; an empty tuple means all."""

    models: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    shards: str | None = None  # what to stream; None: data in memory only
    batch: int | None = None
    quick: bool = False
    largest_batch: bool = False
    control: bool = True  # the first variant once more at the end
    minutes: float | None = None


def shapes(device: torch.device, quick: bool) -> tuple[Shape, ...]:
    if device.type == "cuda":
        return GPU_SHAPES[:1] if quick else GPU_SHAPES
    return (QUICK_CPU_SHAPE,) if quick else CPU_SHAPES[:1]


def measure(selection: Selection, report: Callable[[str], None]) -> dict[str, Any]:
    """Measures a selection on this machine. Raises ValueError for an unknown name."""
    device, names = pick_device(), [variant.name for variant in VARIANTS]
    models = shapes(device, selection.quick)
    pick_known("model", selection.models, [shape.name for shape in models])
    pick_known("variant", selection.variants, names)
    by_name = {variant.name: variant for variant in VARIANTS}
    chosen = [by_name[name] for name in selection.variants or by_name]  # in the order asked for
    environment, start = describe(device), time.time()
    cases: list[dict[str, Any]] = []
    error = None
    try:
        for shape in models:
            if not selection.models or shape.name in selection.models:
                measure_model(shape, chosen, selection, device, cases, start, report)
    except KeyboardInterrupt:
        error = "it was interrupted"
    return {
        "suite": "train",
        "quick": selection.quick,
        "environment": environment,
        "seconds": time.time() - start,
        "cases": cases,
        "error": error,
    }


def measure_model(
    shape: Shape,
    chosen: Sequence[Variant],
    selection: Selection,
    device: torch.device,
    cases: list[dict[str, Any]],
    start: float,
    report: Callable[[str], None],
) -> None:
    """Adds one model to `cases`, and to it one variant after the other."""
    order: dict[str, Any] = {
        "shape": vars(shape),
        "batch": selection.batch or shape.batches[0],
        "precision": "bf16" if device.type == "cuda" else "fp32",
        "steps": 20 if device.type == "cuda" else (8 if selection.quick else 12),
        "largest_batch": selection.largest_batch and device.type == "cuda",
    }
    report(f"{shape.name}: losses of the reference")
    expected = run_variant(order | {"variant": REFERENCE.name})
    order["peak"] = expected.get("peak")  # one for all, since on a CPU it is measured
    rows: list[dict[str, Any]] = []
    case = {
        "model": shape.name,
        "batch": order["batch"],
        "precision": order["precision"],
        "reference": expected,
        "best_peer": None,
        "variants": rows,
    }
    cases.append(case)
    jobs = [(variant, "memory") for variant in chosen]
    if selection.shards:
        streaming = SHARDS_VARIANTS[:1] if selection.quick else SHARDS_VARIANTS
        jobs += [(variant, "shards") for variant in chosen if variant.name in streaming]
    if selection.control and not (selection.quick and device.type == "cpu"):  # which is not for comparing
        jobs.append((chosen[0], CONTROL))
    for variant, data in jobs:
        row = {"variant": variant.name, "title": variant.title, "ours": variant.ours, "data": data}
        late = selection.minutes is not None and time.time() - start > 60 * selection.minutes
        if late:
            row |= {"status": "skipped", "reason": "no time was left for it"}
        elif selection.quick and variant.slow and (device.type == "cpu" or "max-autotune" in variant.name):
            row |= {"status": "skipped", "reason": f"{variant.slow}: not in a quick run"}
        else:
            shards = selection.shards if data == "shards" else None
            row |= judged(run_variant(order | {"variant": variant.name, "shards": shards}), expected, order)
        rows.append(row)
        case["best_peer"] = best_peer(rows)
        report(f"{shape.name}, {variant.name}, {data}: {row['status']} ({time.time() - start:.0f} s)")


def judged(row: dict[str, Any], expected: dict[str, Any], order: dict[str, Any]) -> dict[str, Any]:
    """The row, "wrong" if its losses leave those of the reference, and without a verdict if there are none."""
    if row["status"] != "ok":
        return row
    if expected["status"] != "ok":
        return row | {"status": "unchecked", "reason": f"the reference {expected['status']}: {expected['reason']}"}
    pairs = zip(row["losses"], expected["losses"], strict=True)
    # no comparison with NaN holds, so it would get lost in `max`
    distances = [abs(loss / wanted - 1) if math.isfinite(loss) else math.inf for loss, wanted in pairs]
    row["loss_distance"] = distance = max(distances)
    if distance > TOLERANCE[order["precision"]]:
        row |= {"status": "wrong", "reason": f"a loss of the first steps is off by {100 * distance:.2g} %"}
    return row


def best_peer(rows: Sequence[dict[str, Any]]) -> str | None:
    peers = [row for row in rows if row["status"] == "ok" and not row["ours"] and row["data"] == "memory"]
    return min(peers, key=lambda row: row["ms"][1])["variant"] if peers else None


def run_variant(order: dict[str, Any]) -> dict[str, Any]:
    """What a variant's own process writes, or how it ended."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log").open("w+") as log:
        place = Path(folder, "order.json")
        place.write_text(json.dumps(order))
        command, finished = [sys.executable, "-m", "benchmarks.train_process", str(place)], False
        with (
            start_ranks(command, 1, environment, stdout=log, stderr=log) as (process,),
            suppress(subprocess.TimeoutExpired),
        ):
            process.wait(TIME_LIMIT)
            finished = True
        result = Path(folder, "result.json")
        if result.exists():
            return dict(json.loads(result.read_text()))
        log.seek(0)
        last = next((line for line in reversed(log.read().splitlines()) if line.strip()), "it printed nothing")
        why = f"exit code {process.returncode}: {last[:300]}" if finished else f"not done after {TIME_LIMIT} s"
        return {"status": "failed", "reason": why}
