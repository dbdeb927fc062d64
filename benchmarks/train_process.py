"""What the process of one variant of `fastvit bench train` does: checks its first losses, then times its steps.

python -m benchmarks.train_process ORDER.json
"""

import argparse
import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.apex_detection import first_line
from benchmarks.kernels import spread
from benchmarks.machine import sensors
from benchmarks.registry import Unusable
from benchmarks.shapes import Shape
from benchmarks.timing import Clock
from benchmarks.train_variants import REFERENCE, VARIANTS, Setup, resident_batches
from fastvit_engine.data import prepare_data
from fastvit_engine.distributed.world import join_world
from fastvit_engine.train.throughput import Peak, peak_flops, peak_memory_bytes

CHECKED_STEPS = 5
SLOWEST = 40  # kernels of a step that are listed

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


def child(place: Path) -> None:
    """`python -m benchmarks.train_process ORDER.json` writes result.json beside its order."""
    order = json.loads(place.read_text())
    try:
        result = {"status": "ok"} | measure_variant(order, place.parent)
    except Unusable as error:
        result = {"status": "skipped", "reason": str(error)}
    except Exception as error:
        result = {"status": "failed", "reason": first_line(error)}
        print(result["reason"], flush=True)
    place.with_name("result.json").write_text(json.dumps(result))
    os._exit(0)  # an orderly exit would wait for peers, of which there are none


def measure_variant(order: dict[str, Any], scratch: Path) -> dict[str, Any]:
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
            "mfu": rate * variant.flops(setup.config().model) / peak.flops,
            "peak_flops": peak.flops,
            "peak_source": peak.source,
            "memory_bytes": peak_memory_bytes(world.device),
            "sensors": [before, sensors(world.device)],
        }
        result["host_ms"] = host_milliseconds(step, batches, clock)
        result |= profile_steps(step, batches, clock)
        if order["largest_batch"]:
            result["largest_batch"] = largest_batch(step, resident[0])
        return result


def stream(setup: Setup, pattern: str, scratch: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches from shards as training reads them."""
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


def host_milliseconds(step: Any, batches: Iterator[tuple[Tensor, Tensor]], clock: Clock, steps: int = 3) -> float:
    """From the call of a step to its return, with an idle GPU at the start: at most what Python and launching take.

    A driver's queue is finite: where the GPU is slower than the host, part of this is waiting for room in it.
    """
    taken = []
    for _ in range(steps):
        batch = next(batches)
        clock.wait()
        start = time.perf_counter()
        step(*batch)
        taken.append(1e3 * (time.perf_counter() - start))
    return median(taken)


def profile_steps(step: Any, batches: Iterator[tuple[Tensor, Tensor]], clock: Clock, steps: int = 2) -> dict[str, Any]:
    """Milliseconds per step by the purpose of kernels (on a GPU) or operators (on a CPU), and the slowest by name."""
    activities = torch.profiler.ProfilerActivity
    kinds = [activities.CPU] + ([activities.CUDA] if clock.on_gpu else [])
    with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
        for _ in range(steps):
            step(*next(batches))
        clock.wait()
    totals: dict[str, float] = defaultdict(float)
    kernels = []
    for event in profile.key_averages():
        if clock.on_gpu and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        taken = 1e-3 * (event.self_device_time_total if clock.on_gpu else event.self_cpu_time_total) / steps
        totals[classify(event.key)] += taken
        kernels.append({"name": event.key, "ms": taken, "calls": event.count / steps, "kind": classify(event.key)})
    kernels.sort(key=lambda kernel: -kernel["ms"])
    return {"breakdown_ms": dict(sorted(totals.items())), "slowest": kernels[:SLOWEST]}


def classify(name: str) -> str:
    return next((kind for kind, pattern in CLASSES if re.search(pattern, name.lower())), "elementwise and rest")


def largest_batch(step: Any, batch: tuple[Tensor, Tensor]) -> int:
    """The largest batch of a step that fits in the GPU's memory, to a sixteenth."""

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
