"""Measures how long saving a checkpoint blocks training, against writing it before training continues.

    python -m benchmarks.checkpoint_blocking [--quick] [--out DIR]

A ViT-L/16 (304 million parameters) is trained at ZeRO-1 by two processes on CPUs. In each round it takes a few steps
three times, in an order that rotates: without a checkpoint; after `save`, whose copy the first update waits for while
threads write; and after `save` and `settle(wait=True)`, which returns when all files are written, flushed to the disk
(fsync) and published. Both kinds of save write the same data: weights, both moments of Adam, and the manifest.

*Blocked* is the time in those calls and in `before_update`, of the slower process. What a save costs the steps beside
it, which share processors, memory and disk with the threads, is in the time of the whole turn.
"""

import argparse
import itertools
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.publish import publish
from benchmarks.step_overhead import describe_machine, resident_batches
from fastvit_engine.checkpoint import Checkpointer, TrainerState, store_of
from fastvit_engine.config import Resolved, load_config
from fastvit_engine.data.stream.batch_split import split_batch
from fastvit_engine.distributed.supervise import start_ranks
from fastvit_engine.distributed.world import World, join_world
from fastvit_engine.engine.build import build_engine
from fastvit_engine.models import build_vit, parameter_count
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_kernels import FusedCrossEntropy

PROCESSES = 2
ROUNDS = 5
STEPS = 2  # of a turn: about as long as writing takes
KINDS = ("none", "asynchronous", "synchronous")


def resolve(quick: bool) -> Resolved:
    """The model at 112 pixels: nearly all of its parameters are there, and a step takes seconds on a CPU."""
    model = "{name: Ti/16, image_size: 32, num_classes: 1000}" if quick else "{name: L/16, image_size: 112}"
    settings = [f"model={model}", "train.global_batch_size=2", "train.precision=fp32", "zero.stage=1"]
    settings.append("deepspeed.zero_optimization.reduce_bucket_size=20000000")  # less memory
    return load_config("quickstart", [*settings, "checkpoint.keep=1", "data.train_samples=1000", "data.eval=null"])


def measure(world: World, quick: bool, folder: Path) -> dict[str, Any]:
    """Seconds blocked and seconds of the whole turn, by kind, of each round."""
    config = resolve(quick).config
    torch.manual_seed(0)
    model = build_vit(config.model, mean=config.data.mean, std=config.data.std)
    split = split_batch(config, world.size)
    engine, criterion = build_engine(model, config, split, world), FusedCrossEntropy("softmax")
    run = RunFolder(folder)
    store = store_of(config.checkpoint, run)
    checkpointer = Checkpointer(run, store, engine, None, world, config.checkpoint, say=lambda text: None)
    fingerprint = {"model": config.model.model_dump(mode="json")}
    batch = resident_batches(config)[0]
    own = slice(world.rank * split.micro_batch_size, (world.rank + 1) * split.micro_batch_size)

    def train_step() -> float:
        """Takes a step; the seconds that its update waited for a copy."""
        engine.backward(criterion(engine.model(batch.images[own]), batch.labels[own]))
        ready = time.perf_counter()
        checkpointer.before_update()
        waited = time.perf_counter() - ready
        engine.step()
        return waited

    numbers = itertools.count(1)

    def turn(kind: str) -> tuple[float, float]:
        """(seconds blocked, seconds of all), of the slower process."""
        world.barrier()
        started = time.perf_counter()
        if kind != "none":
            checkpointer.save(TrainerState(next(numbers), fingerprint))
        if kind == "synchronous":
            checkpointer.settle(wait=True)
        blocked = time.perf_counter() - started if kind != "none" else 0.0
        blocked += sum(train_step() for _ in range(STEPS))
        blocked, seconds = world.max([blocked, time.perf_counter() - started]).tolist()
        checkpointer.close()
        return blocked, seconds

    train_step()  # which gives the optimizer its state
    first, _ = turn("asynchronous")
    turns: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for number in range(ROUNDS):
        for kind in KINDS[number % 3 :] + KINDS[: number % 3]:
            turns[kind].append(turn(kind))
    return {
        "model": config.model.name,
        "image_size": config.model.image_size,
        "parameters": parameter_count(config.model),
        "bytes": sum(path.stat().st_size for path in run.checkpoints.glob("step-*/*")),
        "steps": STEPS,
        "first_blocked": first,
        "blocked": {kind: [blocked for blocked, _ in turns[kind]] for kind in KINDS[1:]},
        "seconds": {kind: [seconds for _, seconds in turns[kind]] for kind in KINDS},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint_blocking", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="a small model: does it run?")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("benchmarks/results/cpu"))
    parser.add_argument("--folder", metavar="DIR", type=Path, help="where to save (default: a temporary folder)")
    args = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else list(arguments)
    if "RANK" in os.environ:
        with join_world() as world:
            results = measure(world, args.quick, args.folder)
            if world.is_main:
                (args.folder / "results.json").write_text(json.dumps(results))
        return
    environment = describe_machine(shlex.join(["python", "-m", "benchmarks.checkpoint_blocking", *words]))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        results = _run_ranks([*words, "--folder", folder], Path(folder))
    environment |= {"threads": 1, "world_size": PROCESSES, "precision": "fp32", "zero_stage": 1}
    results = {"environment": environment, **results}
    publish(results, args.out, "checkpoint_blocking", render)


def _run_ranks(words: Sequence[str], folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.checkpoint_blocking", *words]
    with start_ranks(command, PROCESSES, {**os.environ, "OMP_NUM_THREADS": "1"}) as ranks:
        codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit("a process failed")
    return json.loads((folder / "results.json").read_text())


def render(results: Mapping[str, Any]) -> str:
    """The tables of `results`, as Markdown."""
    environment, blocked, seconds = results["environment"], results["blocked"], results["seconds"]
    ratios = [a / s for a, s in zip(blocked["asynchronous"], blocked["synchronous"], strict=True)]
    lost = {
        kind: [with_it - without for with_it, without in zip(seconds[kind], seconds["none"], strict=True)]
        for kind in blocked
    }
    what = {
        "synchronous": "written, flushed and published before training continues",
        "asynchronous": "copied to host memory before the next update; written while training continues",
    }
    rows = [f"| {kind} | {_spread(blocked[kind])} | {_spread(lost[kind])} | {text} |" for kind, text in what.items()]
    lines = [
        "# How long saving a checkpoint blocks training",
        "",
        f"`{environment['command']}`, {environment['started']}: {environment['cpu']}, {environment['cpu_count']} "
        f"cores, {environment['world_size']} processes of one thread (Gloo), ZeRO-1, fp32; load "
        f"average {environment['load_average'][0]:.2f} at the start. ViT {results['model']} at "
        f"{results['image_size']} pixels, one image per process, {results['parameters']:,} parameters: "
        f"{results['bytes'] / 1e9:.2f} GB a checkpoint. {len(ratios)} rounds; {results['steps']} steps take "
        f"{_spread(seconds['none'])} s without a checkpoint. Medians and ranges:",
        "",
        "| save | blocked, s | the turn is longer by, s | what it waits for |",
        "|---|---:|---:|---|",
        *rows,
        "",
        f"Blocked, asynchronous over synchronous, round by round: {min(ratios):.3f} to {max(ratios):.3f}, median "
        f"{statistics.median(ratios):.3f}. The first save of a run, which also touches its memory for the first time: "
        f"{results['first_blocked']:.2f} s.",
    ]
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
