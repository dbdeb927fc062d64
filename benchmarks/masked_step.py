"""How many times as fast a step of a masked autoencoder is as a supervised one of the same encoder and batch, on a CPU.

    python -m benchmarks.masked_step [--images N] [--rounds N] [--out DIR]

The models have the proportions of ViT-H/14 and of the decoder of its recipe, a quarter as wide and as deep: 256
patches, width 320 and 8 blocks, 128 and 2 blocks in the decoder. A step is what training computes: losses, backward
pass, AdamW. Steps of both kinds take turns on one thread, whose CPU time counts: other work on the machine takes none
of it, and what it does to caches and clocks hits both.
"""

import argparse
import json
import statistics
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch

from benchmarks.step_overhead import describe_machine
from fastvit_engine.config import Config
from fastvit_engine.data import Batch
from fastvit_engine.files import atomic_write
from fastvit_engine.models import build_for_training, run_flops
from fastvit_engine.objectives import build_objective

QUARTER = {"name": "H/14", "width": 320, "depth": 8, "heads": 4}
KINDS: dict[str, dict[str, Any]] = {
    "supervised": {"model": QUARTER, "train": {"objective": "classify"}},
    "masked": {
        "model": QUARTER | {"pool": "gap", "pos_embed": "sincos_2d", "num_classes": 0},
        "mae": {"mask_ratio": 0.75, "decoder_width": 128, "decoder_depth": 2, "decoder_heads": 4},
        "train": {"objective": "mae"},
    },
}


class Stepper:
    """A model in training on one batch."""

    def __init__(self, sections: dict[str, Any], images: int) -> None:
        self.config = Config.model_validate(sections)
        device, size = torch.device("cpu"), self.config.model.image_size
        torch.manual_seed(0)
        self.model = build_for_training(self.config)
        self.objective = build_objective(self.config, device)
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(learning, lr=1e-4, fused=True)
        pixels = torch.randint(0, 256, (images, size, size, 3), dtype=torch.uint8)
        keys, labels = [str(number) for number in range(images)], torch.zeros(images, dtype=torch.int64)
        self.batch = Batch(pixels, labels, torch.ones(images), keys, np.arange(images))

    def step(self) -> float:
        """CPU seconds of one step."""
        started = process_time()
        self.optimizer.zero_grad()
        self.objective.losses(self.model, self.batch).mean().backward()
        self.optimizer.step()
        return process_time() - started


def measure(images: int, rounds: int, kinds: dict[str, dict[str, Any]] = KINDS) -> dict[str, Any]:
    """Median CPU milliseconds of a step of each kind, their ratio by rounds, and that of the operations counted."""
    steppers = {kind: Stepper(sections, images) for kind, sections in kinds.items()}
    for stepper in steppers.values():
        stepper.step()
    seconds: dict[str, list[float]] = {kind: [] for kind in steppers}
    for number in range(rounds):
        for kind in list(steppers)[:: -1 if number % 2 else 1]:
            seconds[kind].append(steppers[kind].step())
    ratios = [supervised / masked for supervised, masked in zip(seconds["supervised"], seconds["masked"], strict=True)]
    flops = {kind: run_flops(stepper.config).computed for kind, stepper in steppers.items()}
    return {
        "images": images,
        "rounds": rounds,
        "milliseconds": {kind: 1000 * statistics.median(values) for kind, values in seconds.items()},
        "times_as_fast": statistics.median(ratios),
        "slowest_and_fastest_round": [min(ratios), max(ratios)],
        "flops_ratio": flops["supervised"] / flops["masked"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8, metavar="N", help="images of a step (default: 8)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="steps of each kind (default: 15)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write masked_step.json there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(args.images, args.rounds)
    low, high = found["slowest_and_fastest_round"]
    for kind, milliseconds in found["milliseconds"].items():
        print(f"{kind:<10}  {milliseconds:8.1f} CPU ms per step")
    print(
        f"masked steps are {found['times_as_fast']:.2f} times as fast ({low:.2f} to {high:.2f} in single rounds); "
        f"{found['flops_ratio']:.2f} times fewer operations are counted"
    )
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        environment = describe_machine(
            f"python -m benchmarks.masked_step --images {args.images} --rounds {args.rounds}"
        )
        environment.pop("hostname")
        atomic_write(args.out / "masked_step.json", json.dumps({**found, "environment": environment}, indent=1) + "\n")


if __name__ == "__main__":
    main()
