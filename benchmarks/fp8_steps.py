"""Training steps in FP8 beside those in bf16, one after the other in one process, and their losses.

    python -m benchmarks.fp8_steps --out DIR
    python -m benchmarks.fp8_steps --out DIR --batch 64 --steps 2000 --only "bf16" "fp8 tensor"

All variants start from the same weights of ViT-H/14 and see the same batches: noise around a picture of each class,
which can be learned. Every step is taken by each variant in turn, so that clocks and heat are the same for all. Peers
are torchao and TransformerEngine in timm's model, compiled or as they come, if they are installed. Writes `fp8.json`,
with all times and losses, and `fp8.md`. Without a GPU: a tiny model, whose FP8 is emulated; times then say nothing.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.registry import Unusable
from benchmarks.shapes import GPU_SHAPES, Shape
from benchmarks.timing import Clock
from benchmarks.train import QUICK_CPU_SHAPE
from benchmarks.train_variants import CLASSES, Setup, Step, fastvit_deepspeed, timm_in_fp8
from fastvit_engine.distributed.world import join_world
from fastvit_engine.files import atomic_write

BASE = "bf16"
BUILDS: dict[str, Callable[[Setup], Step]] = {
    BASE: fastvit_deepspeed(1),
    "fp8 tensor": fastvit_deepspeed(1, fp8="tensor"),
    "fp8 row": fastvit_deepspeed(1, fp8="row"),
    "timm + torchao": timm_in_fp8("torchao"),
    "timm + TransformerEngine": timm_in_fp8("transformer_engine"),
}
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
WARM_UP = 5  # steps that are not timed
SMOOTHED = 50  # steps whose mean loss is compared


def batches(shape: Shape, batch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Images uint8 [B, H, W, 3] and labels, endless and the same in every run."""
    size = (shape.image, shape.image, 3)
    pictures = torch.randint(0, 256, (CLASSES, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for step in count():
        drawn = torch.Generator().manual_seed(step + 1)
        labels = torch.randint(0, CLASSES, (batch,), generator=drawn)
        noise = torch.randint(0, 128, (batch, *size), generator=drawn, dtype=torch.uint8)
        signal = torch.nn.functional.interpolate(pictures[labels].permute(0, 3, 1, 2).float(), size[:2])
        images = (signal.permute(0, 2, 3, 1) / 2).to(torch.uint8) + noise
        yield images.to(device), labels.to(device)


def measure(shape: Shape, batch: int, steps: int, only: Sequence[str], seconds: float) -> dict[str, Any]:
    """Every variant's losses and milliseconds, step by step, or why it takes no part. Ends after `seconds` at most."""
    begun = time.monotonic()
    if "RANK" not in os.environ:
        os.environ |= ALONE
    with join_world() as world:
        setup = Setup(shape, batch, "bf16", world)
        running: dict[str, Step] = {}
        found: dict[str, dict[str, Any]] = {}
        for name in only or BUILDS:
            found[name] = {"losses": [], "ms": [], "reason": ""}
            try:
                running[name] = BUILDS[name](setup)
            except Unusable as error:
                found[name]["reason"] = str(error)
        clock, given = Clock(world.device), batches(shape, batch, world.device)
        for number in range(steps):
            if time.monotonic() - begun > seconds:
                break
            images, labels = next(given)
            for name in list(running):
                try:
                    milliseconds, loss = timed(running[name], images, labels, clock)
                except Exception as error:  # of a peer, which must not stop the others
                    found[name]["reason"] = f"{type(error).__name__}: {error}"[:300]
                    del running[name]
                    continue
                found[name]["losses"].append(loss)
                if number >= WARM_UP:
                    found[name]["ms"].append(milliseconds)
        return {"environment": describe(world.device), "model": shape.name, "batch": batch, "variants": found}


def timed(step: Step, images: Tensor, labels: Tensor, clock: Clock) -> tuple[float, float]:
    clock.wait()
    begin = clock.mark()
    loss = step(images, labels)
    end = clock.mark()
    clock.wait()
    return clock.milliseconds(begin, end), loss.item()


def table(found: dict[str, Any]) -> str:
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
        pairs = list(zip(base["ms"], row["ms"], strict=False))
        faster = f"{median(before / now for before, now in pairs):.3f}" if pairs else ""
        together = min(len(base["losses"]), len(row["losses"])) or len(row["losses"])
        loss = mean(row["losses"][:together][-SMOOTHED:])
        ratio = loss / mean(base["losses"][:together][-SMOOTHED:]) - 1 if base["losses"] else 0.0
        said = f"{row['reason']}; " if row["reason"] else ""
        lines.append(f"| {name} | {said}{median(row['ms']):.1f} | {faster} | {loss:.4f} | {100 * ratio:+.2f} % |")
    return "\n".join(lines) + "\n"


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
    found = measure(shape, batch, steps, parsed.only, 60 * parsed.minutes)
    parsed.out.mkdir(parents=True, exist_ok=True)
    atomic_write(parsed.out / "fp8.json", json.dumps(found, indent=1) + "\n")
    atomic_write(parsed.out / "fp8.md", table(found))
    print(table(found))
    return 0 if found["variants"].get("fp8 tensor", {"ms": [0]})["ms"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
