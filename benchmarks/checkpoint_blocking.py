"""How long training stands still for a checkpoint, against writing it before training goes on.

    python -m benchmarks.checkpoint_blocking [--quick] [--out DIR]

A ViT-L/16 (304 million parameters) is trained at ZeRO-1 by two processes on CPUs, and saved in two ways in turn:
`save`, after which training goes on while threads write, and `save` followed by `settle(wait=True)`, which returns when
all files are written, flushed to the disk (fsync) and published. Both write the same data: weights, both moments of
Adam, and the manifest. A time is that of the slower process. A save only begins when the one before has ended; no step
is taken meanwhile, which would need more memory than a small machine has.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.step_overhead import describe_machine, resident_batches
from fastvit_engine.config import Resolved, load_config
from fastvit_engine.launch import free_port, rank_environment
from fastvit_engine.models import build_model, parameter_count
from fastvit_engine.observe.run_folder import RunFolder, atomic_write
from fastvit_engine.train.checkpoint import Checkpointer, place_of
from fastvit_engine.train.distributed import World, join_world
from fastvit_engine.train.engine import build_engine, split_batch
from fastvit_engine.train.engine_state import EngineState
from fastvit_kernels import FusedCrossEntropy

PROCESSES = 2
ROUNDS = 5


def resolve(quick: bool) -> Resolved:
    """The model at 32 pixels: nearly all of its parameters are there, and a step takes seconds on a CPU."""
    model = "{name: Ti/16, image_size: 32, num_classes: 1000}" if quick else "{name: L/16, image_size: 32}"
    settings = [f"model={model}", "train.global_batch_size=2", "train.precision=fp32", "zero.stage=1"]
    settings.append("deepspeed.zero_optimization.reduce_bucket_size=20000000")  # less memory
    return load_config("quickstart", [*settings, "checkpoint.keep=1", "data.train_samples=1000", "data.eval=null"])


def measure(world: World, quick: bool, folder: Path) -> dict[str, Any]:
    """The seconds of each save, by kind and round; round 0 is the first of its kind."""
    config = resolve(quick).config
    torch.manual_seed(0)
    model = build_model(config.model, mean=config.data.mean, std=config.data.std)
    split = split_batch(config, world.size)
    engine, criterion = build_engine(model, config, split, world), FusedCrossEntropy("softmax")
    state, run = EngineState(engine), RunFolder(folder)
    batch = resident_batches(config)[0]
    own = slice(world.rank * split.micro_batch_size, (world.rank + 1) * split.micro_batch_size)
    loss = criterion(engine(batch.images[own]), batch.labels[own])
    engine.backward(loss)
    engine.step()  # which gives the optimizer its state
    engine.optimizer.zero_grad()
    place = place_of(config.checkpoint, run)
    checkpointer = Checkpointer(run, place, state, None, world, config.checkpoint, say=lambda text: None)
    seconds: dict[str, list[float]] = {"first save": [], "asynchronous": [], "synchronous": []}
    for step, kind in enumerate(["first save", *["asynchronous", "synchronous"] * ROUNDS], start=1):
        world.barrier()
        started = time.perf_counter()
        checkpointer.save(step, {"accuracy": {}})
        if kind == "synchronous":
            checkpointer.settle(wait=True)
        seconds[kind].append(world.max([time.perf_counter() - started]).item())
        checkpointer.close()
    size = sum(path.stat().st_size for path in run.checkpoints.glob("step-*/*"))
    return {"model": config.model.name, "parameters": parameter_count(config.model), "bytes": size, "seconds": seconds}


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
    args.out.mkdir(parents=True, exist_ok=True)
    atomic_write(args.out / "checkpoint_blocking.json", json.dumps(results, indent=1) + "\n")
    atomic_write(args.out / "checkpoint_blocking.md", render(results))
    print(render(results))


def _run_ranks(words: Sequence[str], folder: Path) -> dict[str, Any]:
    port, command = free_port(), [sys.executable, "-m", "benchmarks.checkpoint_blocking", *words]
    ranks = [
        subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", **rank_environment(rank, PROCESSES, port)})
        for rank in range(PROCESSES)
    ]
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit("a process failed")
    return json.loads((folder / "results.json").read_text())


def render(results: Mapping[str, Any]) -> str:
    """The table of `results`, as Markdown."""
    environment, seconds = results["environment"], results["seconds"]
    ratios = [a / s for a, s in zip(seconds["asynchronous"], seconds["synchronous"], strict=True)]
    what = {
        "synchronous": "written, flushed and published before training goes on",
        "asynchronous": "copied to host memory; the rest happens while training goes on",
        "first save": "likewise, and the memory for the copy is allocated",
    }
    rows = []
    for kind, text in what.items():
        times = seconds[kind]
        rows.append(f"| {kind} | {statistics.median(times):.2f} | {min(times):.2f} to {max(times):.2f} | {text} |")
    lines = [
        "# How long training stands still for a checkpoint",
        "",
        f"`{environment['command']}`, {environment['started']}: {environment['cpu']}, {environment['cpu_count']} "
        f"cores, {environment['world_size']} processes of one thread (Gloo), ZeRO-1, fp32; load "
        f"average {environment['load_average'][0]:.2f} at the start. ViT {results['model']}, "
        f"{results['parameters']:,} parameters: {results['bytes'] / 1e9:.2f} GB a checkpoint. The two kinds of save "
        f"take turns, {len(ratios)} rounds.",
        "",
        "| | seconds, median | range | what it is |",
        "|---|---:|---:|---|",
        *rows,
        "",
        f"Asynchronous over synchronous, round by round: {min(ratios):.3f} to {max(ratios):.3f}, median "
        f"{statistics.median(ratios):.3f}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
