"""Whole training steps (forward, backward, optimizer), ours and those of others, each in a process of its own.

Every variant starts from the same weights and must first follow the losses of plain timm in float32 for a few steps;
one that does not is shown as wrong, without a ratio. The first variant is measured once more at the end: how far it is
from itself says what a difference means on this machine.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.apex_detection import first_line
from benchmarks.kernels import pick_known, spread
from benchmarks.machine import ROOT, describe, pick_device, sensors
from benchmarks.registry import Unusable
from benchmarks.shapes import CPU_SHAPES, GPU_SHAPES, Shape
from benchmarks.timing import Clock

if TYPE_CHECKING:
    from benchmarks.train_variants import Variant

CHECKED_STEPS = 5
# Relative distance that a loss of the first steps may have. Rounding of weights in bf16 is 2^-8, and Adam turns signs.
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
QUICK_CPU_SHAPE = Shape("tiny/16@64", 16, 64, 96, 2, 384, 3, (16,))
SHARDS_VARIANTS = ("fastvit", "fastvit ZeRO-1", "timm compile")  # measured from shards too
CONTROL = "control"
TIME_LIMIT = 1200  # seconds for one variant

# What a kernel or operator is for, by its name; the first that fits.
CLASSES = (
    ("communication", r"nccl|all_?reduce|all_?gather|reduce_?scatter|gloo"),
    ("optimizer", r"adam|multi_tensor|foreach|optimizer"),
    ("attention", r"attention|flash|fmha|sdpa"),
    ("matrix products", r"gemm|matmul|cutlass|cublas|nvjet|xmma|aten::(addmm|mm|bmm|baddbmm|linear)|conv|im2col"),
    ("normalisation", r"layer_?norm"),
    ("loss", r"cross_entropy|softmax|nll"),
    ("copies", r"memcpy|memset|copy_|aten::(cat|stack|fill_|zero_)"),
)


@dataclass(frozen=True)
class Selection:
    models: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    shards: str | None = None  # what to stream; None: data in memory only
    batch: int | None = None
    quick: bool = False
    largest_batch: bool = False
    minutes: float | None = None


def shapes(device: torch.device, quick: bool) -> tuple[Shape, ...]:
    if device.type == "cuda":
        return GPU_SHAPES[:1] if quick else GPU_SHAPES
    return (QUICK_CPU_SHAPE,) if quick else CPU_SHAPES[:1]


def measure(selection: Selection, report: Callable[[str], None]) -> dict[str, Any]:
    """Measures a selection on this machine. ValueError for a name that there is not."""
    from benchmarks.train_variants import VARIANTS

    device, names = pick_device(), [variant.name for variant in VARIANTS]
    models = shapes(device, selection.quick)
    pick_known("model", selection.models, [shape.name for shape in models])
    pick_known("variant", selection.variants, names)
    chosen = [variant for variant in VARIANTS if not selection.variants or variant.name in selection.variants]
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
    chosen: Sequence["Variant"],
    selection: Selection,
    device: torch.device,
    cases: list[dict[str, Any]],
    start: float,
    report: Callable[[str], None],
) -> None:
    """Adds one model to `cases`, and to it one variant after the other."""
    from benchmarks.train_variants import REFERENCE

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
    if not (selection.quick and device.type == "cpu"):  # which is not for comparing
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
    """The row, "wrong" where its losses leave those of the reference, and without a verdict where there are none."""
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
    from fastvit_engine.distributed.supervise import start_ranks

    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log").open("w+") as log:
        place = Path(folder, "order.json")
        place.write_text(json.dumps(order))
        command, finished = [sys.executable, "-m", "benchmarks.train", str(place)], False
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
        last = next((line for line in reversed(log.read().splitlines()) if line.strip()), "it said nothing")
        why = f"exit code {process.returncode}: {last[:300]}" if finished else f"not done after {TIME_LIMIT} s"
        return {"status": "failed", "reason": why}


# ---- the process of one variant


def child(place: Path) -> None:
    """`python -m benchmarks.train ORDER.json` writes result.json beside its order."""
    order = json.loads(place.read_text())
    try:
        result = {"status": "ok"} | measure_variant(order, place.parent)
    except Unusable as error:
        result = {"status": "skipped", "reason": str(error)}
    except Exception as error:
        result = {"status": "failed", "reason": first_line(error)}
        print(result["reason"], flush=True)
    place.with_name("result.json").write_text(json.dumps(result))
    os._exit(0)  # an orderly exit would wait for peers that there are none of


def measure_variant(order: dict[str, Any], scratch: Path) -> dict[str, Any]:
    from benchmarks.train_variants import REFERENCE, VARIANTS, Setup, resident_batches
    from fastvit_engine.distributed.world import join_world
    from fastvit_engine.models import training_flops
    from fastvit_engine.train.throughput import Peak, peak_flops, peak_memory_bytes

    wanted: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in order["shape"].items()}
    shape = Shape(**wanted)
    variant = next(variant for variant in (REFERENCE, *VARIANTS) if variant.name == order["variant"])
    with join_world() as world:
        setup = Setup(shape, order["batch"], order["precision"], world)
        step = variant.build(setup)
        resident = [(batch.images.to(world.device), batch.labels.to(world.device)) for batch in resident_batches(setup)]
        batches: Iterator[tuple[Tensor, Tensor]] = cycle(resident)
        losses = [step(*next(batches)).item() for _ in range(CHECKED_STEPS)]
        if variant is REFERENCE:
            return {"losses": losses, "peak": vars(peak_flops(world, order["precision"]))}
        if order.get("shards"):
            batches = stream(setup, order["shards"], scratch)
        clock, before = Clock(world.device), sensors(world.device)
        milliseconds = time_steps(step, batches, clock, order["steps"])
        peak = Peak(**order["peak"]) if order["peak"] else peak_flops(world, order["precision"])
        rate = order["batch"] / (1e-3 * median(milliseconds))
        result = {
            "losses": losses,
            "ms": spread(milliseconds),
            "steps": len(milliseconds),
            "images_per_second": rate,
            "mfu": rate * training_flops(setup.config().model) / peak.flops,
            "peak_flops": peak.flops,
            "peak_source": peak.source,
            "memory_bytes": peak_memory_bytes(world.device),
            "sensors": [before, sensors(world.device)],
        }
        result["breakdown_ms"] = breakdown(step, batches, clock)
        if order["largest_batch"]:
            result["largest_batch"] = largest_batch(step, resident[0])
        return result


def stream(setup: Any, pattern: str, scratch: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches from shards as training reads them."""
    from fastvit_engine.data import prepare_data

    device = setup.world.device
    config = setup.config(data={"train": pattern, "num_workers": min(16, os.cpu_count() or 1)})
    data = prepare_data(config, world_size=1, index_folder=scratch)
    batches = data.train_batches(
        config,
        rank=0,
        world_size=1,
        micro_batch_size=setup.batch,
        consumed=0,
        pin_memory=device.type == "cuda",
    )
    for batch in batches:
        yield batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)


def time_steps(step: Any, batches: Iterator[tuple[Tensor, Tensor]], clock: Clock, steps: int) -> list[float]:
    """Milliseconds from the end of one step to the end of the next, waiting for data included."""
    for _ in range(3):
        step(*next(batches))
    clock.wait()
    marks = [clock.mark()]
    for _ in range(steps):
        step(*next(batches))
        marks.append(clock.mark())
    clock.wait()
    return [clock.milliseconds(start, end) for start, end in zip(marks, marks[1:], strict=False)]


def breakdown(step: Any, batches: Iterator[tuple[Tensor, Tensor]], clock: Clock, steps: int = 2) -> dict[str, float]:
    """Milliseconds a step by what kernels (of a GPU) or operators (of a CPU) are for."""
    activities = torch.profiler.ProfilerActivity
    kinds = [activities.CPU] + ([activities.CUDA] if clock.on_gpu else [])
    with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
        for _ in range(steps):
            step(*next(batches))
        clock.wait()
    totals: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        if clock.on_gpu and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        taken = event.self_device_time_total if clock.on_gpu else event.self_cpu_time_total
        totals[classify(event.key)] += 1e-3 * taken / steps
    return dict(sorted(totals.items()))


def classify(name: str) -> str:
    return next((kind for kind, pattern in CLASSES if re.search(pattern, name.lower())), "elementwise and rest")


def largest_batch(step: Any, batch: tuple[Tensor, Tensor]) -> int:
    """The most images that a step takes before the GPU's memory is full, to a sixteenth."""

    def fits(size: int) -> bool:
        times = -(-size // len(batch[0]))
        images, labels = (tensor.repeat(times, *[1] * (tensor.ndim - 1))[:size] for tensor in batch)
        try:
            step(images, labels)
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
        return True

    good, bad = len(batch[0]), len(batch[0]) * 2
    while fits(bad):
        good, bad = bad, 2 * bad
    while bad - good > max(1, good // 16):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("order", type=Path)
    child(parser.parse_args().order)
