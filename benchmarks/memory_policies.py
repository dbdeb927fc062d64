"""Training steps under each policy that trades time for memory: time, losses, and memory beside what was predicted.

    python -m benchmarks.memory_policies --out DIR
    python -m benchmarks.memory_policies --out DIR --model B/16 --batch 8 --only compile

The policies are those of `fastvit train`: `train.recompute`, `train.activation_checkpointing`,
`train.offload_activations`, what `train.memory_gib` chooses, `train.compile` and `train.cuda_graph`. Memory is the peak
of what belongs to a variant on the GPU, beside what `fastvit plan` predicts. The first losses must be those of "keep
all". Writes `policies.json`, with all times and losses, the targets and what came of them, and `policies.md`. Without a
GPU: a tiny model, whose memory is not measured.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.shapes import GPU_SHAPES
from benchmarks.side_by_side import faster, measure
from benchmarks.train import QUICK_CPU_SHAPE
from benchmarks.train_variants import Setup, Step, engine_step
from fastvit_engine.files import atomic_write
from fastvit_engine.sizing.defaults import Chosen, choose
from fastvit_engine.sizing.machine import machine_of

GIB = 2**30
TARGETS = {
    "loss": 0.005,  # how far the first losses may be from those of BASE, relative: by rounding in bf16
    "memory": 0.1,  # how far the measured peak may be from the predicted, relative
}
FIRST = 5  # losses that are compared: later ones drift apart

KEEP_ALL: dict[str, Any] = {"recompute": "none", "activation_checkpointing": 0}
CHECKPOINTED = {"recompute": "none", "activation_checkpointing": "all"}


def budgeted(setup: Setup) -> dict[str, Any]:
    """A budget halfway between keeping all and keeping the inputs of blocks alone."""
    most, least = (chosen_for(setup, train).memory.total for train in (KEEP_ALL, CHECKPOINTED))
    return {"memory_gib": (most + least) / 2 / GIB}


BASE = "keep all"
POLICIES: dict[str, Callable[[Setup], dict[str, Any]]] = {
    BASE: lambda setup: KEEP_ALL,
    "recompute gelu": lambda setup: KEEP_ALL | {"recompute": "gelu"},
    "recompute all": lambda setup: KEEP_ALL | {"recompute": "all"},
    "checkpoint half": lambda setup: KEEP_ALL | {"activation_checkpointing": setup.shape.depth // 2},
    "checkpoint all": lambda setup: CHECKPOINTED,
    "offload activations": lambda setup: CHECKPOINTED | {"offload_activations": True},
    "memory budget": budgeted,
    "compile": lambda setup: {"recompute": "none", "compile": True},
    "CUDA graph": lambda setup: KEEP_ALL | {"cuda_graph": True},
}


def chosen_for(setup: Setup, train: Mapping[str, Any]) -> Chosen:
    """What `fastvit train` makes of these settings, in one micro-batch at ZeRO-1."""
    config = setup.config(zero={"stage": 1}, train={"micro_batch_size": setup.batch, **train})
    return choose(config, machine_of(setup.world))


@dataclass
class Policy:
    """Builds the steps of one policy, and remembers what was chosen for it."""

    settings: Callable[[Setup], dict[str, Any]]
    chosen: Chosen | None = None

    def __call__(self, setup: Setup) -> Step:
        self.chosen = chosen_for(setup, self.settings(setup))
        return engine_step(setup, self.chosen.config)

    def record(self) -> dict[str, Any]:
        if self.chosen is None:
            return {}
        train = self.chosen.config.train
        return {
            "recompute": train.recompute,
            "checkpointed_blocks": train.activation_checkpointing,
            "memory_gib": train.memory_gib,
            "predicted_bytes": self.chosen.memory.total,
        }


def distance(base: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    """The largest distance of the first losses from those of `base`, relative; None: there are none.

    Infinite if a loss is not a number: `max` would pass over it.
    """
    pairs = list(zip(base["losses"], row["losses"], strict=False))[:FIRST]
    distances = [abs(loss / other - 1) for other, loss in pairs]
    return max(distances, default=None) if all(map(math.isfinite, distances)) else math.inf


def wrong(found: Mapping[str, Any]) -> list[str]:
    """The variants whose first losses are not those of BASE."""
    rows = found["variants"]
    distances = {name: distance(rows[BASE], row) for name, row in rows.items()}
    return [name for name, far in distances.items() if far is not None and not far <= TARGETS["loss"]]


def table(found: Mapping[str, Any]) -> str:
    rows = found["variants"]
    lines = [
        f"# Steps by memory policy: {found['model']}, {found['batch']} images",
        "",
        f"| policy | recompute | checkpointed blocks | ms (median) | time of {BASE!r} | images/s | host ms | peak, GiB "
        "| predicted, GiB | first losses differ by |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        if not row["ms"]:
            lines.append(f"| {name} | {row['reason'] or 'no step was timed'} | | | | | | | | |")
            continue
        ms, ratio, far = median(row["ms"]), faster(rows[BASE], row), distance(rows[BASE], row)
        measured = "" if row["memory_bytes"] is None else f"{row['memory_bytes'] / GIB:.1f}"
        lines.append(
            f"| {name} | {row['recompute']} | {row['checkpointed_blocks']} | {ms:.1f} "
            f"| {'' if ratio is None else f'{1 / ratio:.3f}'} | {1000 * found['batch'] / ms:,.0f} "
            f"| {median(row['host_ms']):.1f} | {measured} | {row['predicted_bytes'] / GIB:.1f} "
            f"| {'' if far is None else f'{100 * far:.3f} %'} |"
        )
    return "\n".join([*lines, "", *(f"* {verdict}" for verdict in verdicts(found))]) + "\n"


def verdicts(found: Mapping[str, Any]) -> Iterator[str]:
    """A line for each variant that does not compute what it should, fails, or needs other memory than predicted."""
    for name in wrong(found):
        far = 100 * (distance(found["variants"][BASE], found["variants"][name]) or 0)
        yield f"{name}: WRONG: the first losses differ by {far:.2f} %, and may by {100 * TARGETS['loss']} %"
    for name, row in found["variants"].items():
        if row["failed"]:
            yield f"{name}: FAILED: {row['reason']}"
        elif (measured := row["memory_bytes"]) is not None and row["ms"]:
            share, budget = measured / row["predicted_bytes"], row["memory_gib"]
            fits = abs(share - 1) <= TARGETS["memory"] and (budget is None or measured <= budget * GIB)
            of_budget = "" if budget is None else f", budget {budget:.1f}"
            yield (
                f"{name}: peak {measured / GIB:.1f} GiB{of_budget}, {100 * share:.0f} % of what was predicted, target "
                f"within {100 * TARGETS['memory']:.0f} %: {'met' if fits else 'MISSED'}"
            )
    if found["environment"]["gpu"] is None:
        yield "memory is not judged: there is no GPU"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory_policies", description=(__doc__ or "").splitlines()[0]
    )
    sizes = {shape.name: shape for shape in GPU_SHAPES}
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--model", choices=sizes, default="H/14", help="on a GPU (default H/14)")
    parser.add_argument("--batch", type=int, help="images of a step (default: 64 on a GPU)")
    parser.add_argument("--steps", type=int, help="of each variant (default: 60 on a GPU)")
    parser.add_argument("--minutes", type=float, default=60, help="after which no step is begun (default 60)")
    parser.add_argument("--only", nargs="+", default=[], choices=POLICIES, help=f"besides {BASE!r} (default: all)")
    parsed = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    shape = sizes[parsed.model] if on_gpu else QUICK_CPU_SHAPE
    batch, steps = parsed.batch or (64 if on_gpu else 4), parsed.steps or (60 if on_gpu else 8)
    policies = {name: Policy(POLICIES[name]) for name in dict.fromkeys([BASE, *(parsed.only or POLICIES)])}
    found = measure(policies, shape, batch, steps, 60 * parsed.minutes)
    for name, policy in policies.items():
        found["variants"][name] |= policy.record()
    found |= {"targets": TARGETS, "verdicts": list(verdicts(found))}
    parsed.out.mkdir(parents=True, exist_ok=True)
    atomic_write(parsed.out / "policies.json", json.dumps(found, indent=1) + "\n")
    atomic_write(parsed.out / "policies.md", table(found))
    print(table(found))
    failed = any(row["failed"] for row in found["variants"].values())
    return int(failed or bool(wrong(found)) or not found["variants"][BASE]["ms"])


if __name__ == "__main__":
    raise SystemExit(main())
