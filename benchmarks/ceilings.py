"""What this machine can do at best, for the training step of ViT-H/14: a copy, and the block's own matrix products.

    python -m benchmarks.ceilings --out DIR

Twelve products make up a block's forward and backward pass: four layers, each with its output, its input gradient and
its weight gradient. Their rates decide most of a training step's time. Every rate is a median over turns on random
numbers in bf16 (float32 on a CPU). Clocks, temperature and power are read before and after each batch size.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.machine import copy_rate, describe, pick_device, seconds, sensors
from benchmarks.report import number, rate, sensor
from benchmarks.shapes import GPU_SHAPES, QUICK_CPU_SHAPES, Shape
from benchmarks.timing import Clock
from fastvit_engine.files import atomic_write

BATCHES = (256, 64)
TURNS = 20


class Layer(NamedTuple):
    """A matrix product of a block."""

    name: str
    inputs: int
    outputs: int


def layers(shape: Shape) -> list[Layer]:
    width, hidden = shape.width, shape.mlp_dim
    return [
        Layer("qkv", width, 3 * width),
        Layer("proj", width, width),
        Layer("fc1", width, hidden),
        Layer("fc2", hidden, width),
    ]


def products(clock: Clock, shape: Shape, batch: int, turns: int) -> list[dict[str, Any]]:
    """FLOP/s of the twelve, as training calls them: `torch.mm` with the weight or the gradient transposed."""
    dtype = torch.bfloat16 if clock.on_gpu else torch.float32
    rows = batch * shape.tokens

    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=clock.device).to(dtype)

    found = []
    for layer in layers(shape):
        x, weight, grad = draw(rows, layer.inputs), draw(layer.outputs, layer.inputs), draw(rows, layer.outputs)
        calls = {
            "output": lambda x=x, weight=weight: torch.mm(x, weight.T),
            "input gradient": lambda grad=grad, weight=weight: torch.mm(grad, weight),
            "weight gradient": lambda grad=grad, x=x: torch.mm(grad.T, x),
        }
        flops = 2 * rows * layer.inputs * layer.outputs
        for what, call in calls.items():
            taken = seconds(clock, call, turns)
            found.append({"layer": layer.name, "product": what, "ms": 1e3 * taken, "flops_per_second": flops / taken})
    return found


def measure(*, deadline: float, quick: bool = False) -> dict[str, Any]:
    """Copy, then all products at each batch size; a batch size begun after the deadline is left out."""
    device = pick_device()
    clock = Clock(device)
    shape, batches = (GPU_SHAPES[0], BATCHES) if clock.on_gpu else (QUICK_CPU_SHAPES[-1], (4, 2))
    turns = 3 if quick else TURNS
    record: dict[str, Any] = {
        "environment": describe(device, ["python", "-m", "benchmarks.ceilings"]),
        "model": shape.name,
        "copy_bytes_per_second": copy_rate(clock, 1 << (30 if clock.on_gpu else 22), turns),
        "batches": [],
        "left_out": [],
    }
    for batch in batches:
        if time.monotonic() > deadline:
            record["left_out"].append(batch)
            continue
        before = sensors(device)
        rows = products(clock, shape, batch, turns)
        record["batches"].append({"batch": batch, "products": rows, "sensors": [before, sensors(device)]})
    return record


def mean_rate(rows: Sequence[dict[str, Any]]) -> float:
    """FLOP/s over all products together: what a block gets."""
    return sum(row["flops_per_second"] * row["ms"] for row in rows) / sum(row["ms"] for row in rows)


def markdown(record: dict[str, Any]) -> str:
    lines = [
        "# Ceilings",
        "",
        f"Copy on the device: {rate(record['copy_bytes_per_second'], 'bytes')}, read and written.",
    ]
    for case in record["batches"]:
        rows = case["products"]
        lines += ["", f"## Products of {record['model']}, {case['batch']} images", ""]
        lines += ["| layer | product | ms | rate |", "|---|---|---:|---:|"]
        lines += [
            f"| {row['layer']} | {row['product']} | {number(row['ms'])} | {rate(row['flops_per_second'], 'flops')} |"
            for row in rows
        ]
        total = sum(row["ms"] for row in rows)
        lines += ["", f"Together {number(total)} ms per block, {rate(mean_rate(rows), 'flops')}."]
        before, after = case["sensors"]
        if before and after:
            lines += [f"Clocks: before {sensor(before)}; after {sensor(after)}."]
    lines += [f"\nNo time was left for {batch} images." for batch in record["left_out"]]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ceilings",
        description="Measure a copy and the twelve matrix products of a ViT-H/14 block on this machine.",
        epilog="example: python -m benchmarks.ceilings --out results",
    )
    parser.add_argument("--out", type=Path, help="folder for ceilings.json and ceilings.md")
    parser.add_argument("--seconds", type=float, default=60, help="begin no batch size after them (default 60)")
    parser.add_argument("--quick", action="store_true", help="few turns")
    parsed = parser.parse_args(arguments)
    record = measure(deadline=time.monotonic() + parsed.seconds, quick=parsed.quick)
    print(markdown(record))
    if parsed.out:
        parsed.out.mkdir(parents=True, exist_ok=True)
        atomic_write(parsed.out / "ceilings.json", json.dumps(record, indent=1) + "\n")
        atomic_write(parsed.out / "ceilings.md", markdown(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
