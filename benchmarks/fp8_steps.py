"""Training steps in FP8 beside those in bf16, one after the other in one process, and their losses.

    python -m benchmarks.fp8_steps --out DIR
    python -m benchmarks.fp8_steps --out DIR --batch 64 --steps 2000 --only "bf16" "fp8 tensor"

The model is ViT-H/14. Peers are torchao and TransformerEngine in timm's model, compiled or as they come, if they are
installed. Writes `fp8.json`, with all times and losses, the targets and what came of them, and `fp8.md`. Without a
GPU: a tiny model, whose FP8 is emulated; times then say nothing.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from benchmarks.shapes import GPU_SHAPES
from benchmarks.side_by_side import faster, measure
from benchmarks.train import QUICK_CPU_SHAPE
from benchmarks.train_variants import Setup, Step, fastvit_deepspeed, timm_in_fp8
from fastvit_engine.files import atomic_write

BASE = "bf16"
BUILDS: dict[str, Callable[[Setup], Step]] = {
    BASE: fastvit_deepspeed(1),
    "fp8 tensor": fastvit_deepspeed(1, fp8="tensor"),
    "fp8 row": fastvit_deepspeed(1, fp8="row"),
    "timm + torchao": timm_in_fp8("torchao"),
    "timm + TransformerEngine": timm_in_fp8("transformer_engine"),
}
SMOOTHED = 50  # steps whose mean loss is compared


# What FP8 must reach with ViT-H/14 to be worth recommending.
TARGETS = {
    "times_as_fast": 1.35,  # as bf16, in the same process
    "images_per_second": 850,  # on an H200
    "loss": 0.005,  # how far the loss may be from that in bf16, relative,
    "steps": 2000,  # after so many steps
}


def table(found: Mapping[str, Any]) -> str:
    """Times as ratios of pairs, one for each step; losses as the mean of the last steps."""
    rows = found["variants"]
    base = rows.get(BASE, {"ms": [], "losses": []})
    lines = [
        f"# Steps in FP8: {found['model']}, {found['batch']} images",
        "",
        f"| variant | ms (median) | times as fast as {BASE} | loss, last {SMOOTHED} steps | of {BASE}'s |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        if not row["ms"]:
            lines.append(f"| {name} | {row['reason'] or 'no step was timed'} | | | |")
            continue
        ratio = faster(base, row)
        loss, distance = smoothed(base, row)
        said = f"{row['reason']}; " if row["reason"] else ""
        times = "" if ratio is None else f"{ratio:.3f}"
        lines.append(f"| {name} | {said}{median(row['ms']):.1f} | {times} | {loss:.4f} | {100 * distance:+.2f} % |")
    return "\n".join([*lines, "", *(f"* {verdict}" for verdict in verdicts(found))]) + "\n"


def smoothed(base: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[float, float]:
    """Mean loss of the last steps that both have taken, and how far it is from that of `base`, relative."""
    together = min(len(base["losses"]), len(row["losses"])) or len(row["losses"])
    loss = mean(row["losses"][:together][-SMOOTHED:])
    return loss, loss / mean(base["losses"][:together][-SMOOTHED:]) - 1 if base["losses"] else 0.0


def verdicts(found: Mapping[str, Any]) -> Iterator[str]:
    """A line for each target and each of our variants: met, missed, or why that cannot be said."""
    gpu, rows = found["environment"]["gpu"], found["variants"]
    if gpu is None or BASE not in rows:
        yield f"targets are not judged: {'there is no GPU' if gpu is None else f'{BASE} was not measured'}"
        return
    for name in ("fp8 tensor", "fp8 row"):
        row = rows.get(name)
        if row is None or not row["ms"] or (ratio := faster(rows[BASE], row)) is None:
            yield f"{name}: not judged: {(row and row['reason']) or 'no step was timed'}"
            continue
        yield f"{name}: {ratio:.2f} times as fast as {BASE}, target {TARGETS['times_as_fast']}: " + met(
            ratio >= TARGETS["times_as_fast"]
        )
        images = 1000 * found["batch"] / median(row["ms"])
        of_target = met(images >= TARGETS["images_per_second"]) if "H200" in gpu else f"not judged on {gpu}"
        yield f"{name}: {images:,.0f} images/s, target {TARGETS['images_per_second']} on an H200: {of_target}"
        steps, distance = min(len(rows[BASE]["losses"]), len(row["losses"])), smoothed(rows[BASE], row)[1]
        of_target = met(abs(distance) <= TARGETS["loss"])
        if steps < TARGETS["steps"]:
            of_target = f"not judged after {steps:,}"
        yield (
            f"{name}: loss {100 * distance:+.2f} % from {BASE}'s, target {100 * TARGETS['loss']} % after "
            f"{TARGETS['steps']:,} steps: {of_target}"
        )


def met(reached: bool) -> str:
    return "met" if reached else "MISSED"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8_steps", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--batch", type=int, help="images of a step (default: 64 on a GPU)")
    parser.add_argument("--steps", type=int, help="of each variant (default: 200 on a GPU)")
    parser.add_argument("--minutes", type=float, default=60, help="after which no step is begun (default 60)")
    parser.add_argument("--only", nargs="+", default=[], choices=BUILDS, help="variants (default: all)")
    parsed = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    shape = GPU_SHAPES[0] if on_gpu else QUICK_CPU_SHAPE
    batch, steps = parsed.batch or (64 if on_gpu else 4), parsed.steps or (200 if on_gpu else 8)
    builds = {name: BUILDS[name] for name in parsed.only or BUILDS}
    found = measure(builds, shape, batch, steps, 60 * parsed.minutes)
    found |= {"targets": TARGETS, "verdicts": list(verdicts(found))}
    parsed.out.mkdir(parents=True, exist_ok=True)
    atomic_write(parsed.out / "fp8.json", json.dumps(found, indent=1) + "\n")
    atomic_write(parsed.out / "fp8.md", table(found))
    print(table(found))
    return 0 if found["variants"].get("fp8 tensor", {"ms": [0]})["ms"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
