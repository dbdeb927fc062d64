"""The accuracy on CIFAR-10 that a recipe reaches from scratch with several seeds, and the time it takes.

    python -m benchmarks.cifar10 FOLDER --out DIR [--recipe cifar10_cpu] [--cpu-processes 2] [--seeds 0 1 2]

FOLDER has `train-*.tar` and `test-*.tar`, gzipped or not. Everything is done by `fastvit train` and `fastvit evaluate`.
With --runs, a measurement that was interrupted continues: seeds that are done are read, and a run is resumed.
With --choose, the last training shard is held out and takes the place of the test images: settings are chosen there.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median, pstdev, quantiles
from typing import Any

from benchmarks.machine import commit
from benchmarks.plots import HAIR, INK, OURS, machine, pyplot, save
from benchmarks.plots import head as title_of
from benchmarks.publish import publish
from benchmarks.resolution import Command, fastvit, shards_of
from benchmarks.step_overhead import describe_machine
from fastvit_engine.config import load_config
from fastvit_engine.files import atomic_write
from fastvit_engine.observe.metrics import read_metrics


@dataclass(frozen=True)
class Setup:
    """What is trained, and on what it is measured."""

    recipe: str
    train: tuple[str, ...]  # shards
    test: tuple[str, ...]
    settings: tuple[str, ...] = ()  # of every training, over the recipe's
    cpu_processes: int | None = None  # None: one process, or one per GPU


@dataclass(frozen=True)
class Experiment:
    """The trainings of all seeds in one folder of runs, where each leaves a record once it is measured."""

    setup: Setup
    runs: Path
    command: Command = fastvit

    def measure(self, seed: int) -> dict[str, Any]:
        """The record of a seed: read if it is there, otherwise that of a training, which may be resumed.

        Raises SystemExit if the record in the folder is of other settings.
        """
        kept, run = self.runs / f"seed-{seed}.json", self.runs / f"seed-{seed}"
        settings = (*self._data(), f"seed={seed}", *self.setup.settings)
        config = load_config(self.setup.recipe, settings).config
        if (train_samples := config.data.train_samples) is None:
            raise SystemExit(f"{self.setup.recipe} does not say what an epoch is: --set data.train_samples=N")
        made_of = config.model_dump(mode="json", exclude={"seed": True, "data": {"train", "eval"}})
        made_of["shards"] = [Path(shard).name for shard in self.setup.train]
        if kept.exists():
            record: dict[str, Any] = json.loads(kept.read_text())
            if record["made_of"] != made_of:
                raise SystemExit(f"{kept} is of other settings or shards: name another folder with --runs")
            return record
        started, version, load = datetime.now(UTC).isoformat(timespec="seconds"), commit(), os.getloadavg()[0]
        resumed = run.exists()
        words = ["train", self.setup.recipe, *(word for setting in settings for word in ("--set", setting))]
        if self.setup.cpu_processes is not None:
            words += ["--cpu-processes", str(self.setup.cpu_processes)]
        words += ["--out", str(run), "--resume", "auto"]
        ran = self.command(words)
        average = run / "model_ema.safetensors"
        weights = average if average.exists() else run
        evaluated = self.command(["evaluate", str(weights), "--data", f"@{self._list('test')}", "--json"])
        found = json.loads(evaluated.output)
        environment = json.loads((run / "environment.json").read_text())
        training, evaluations = read_metrics(run / "metrics.jsonl")
        last, speeds = training[-1], [row["images_per_second"] for row in training]
        evaluation = "eval_ema" if weights == average else "eval"
        record = {
            "seed": seed,
            "started": started,
            "commit": version,
            "load_average": [load, os.getloadavg()[0]],  # before and after
            "command": shlex.join(["fastvit", *(word.replace(f"{self.runs}/", "") for word in words)]),
            **{name: found[name] for name in ("samples", "top1", "loss")},
            "weights": "averaged" if weights == average else "last",
            "steps": last["step"],
            "epochs": last["samples"] / train_samples,
            "images": last["samples"],
            "flops": last["samples"] * environment["training_flops_per_image"],
            "training_s": last["seconds"],
            "evaluations_s": sum(row["seconds"] for row in evaluations),
            "images_per_second": {"median": median(speeds), "fastest tenth": quantiles(speeds, n=10)[-1]},
            "wall_s": None if resumed else ran.wall_s,  # of the whole command, unless there were several
            "cpu_s": None if resumed else ran.cpu_s,
            "curve": [
                [row["step"] / last["step"] * last["samples"] / train_samples, row["top1"]]
                for row in evaluations
                if row["eval"] == evaluation
            ],
            "made_of": made_of,
        }
        atomic_write(kept, json.dumps(record, indent=1) + "\n")
        return record

    def _data(self) -> tuple[str, str]:
        return f"data.train=@{self._list('train')}", f"data.eval=@{self._list('test')}"

    def _list(self, split: str) -> Path:
        """The file that lists the shards of a split."""
        path = self.runs / f"{split}.txt"
        atomic_write(path, "".join(f"{shard}\n" for shard in getattr(self.setup, split)))
        return path


def summary(recipe: str, seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of a recipe: mean and standard deviation (of the population) over the seeds, and each seed's."""
    top1 = [seed["top1"] for seed in seeds]
    rows = [{name: value for name, value in seed.items() if name != "made_of"} for seed in seeds]
    figures = {"top1": {"mean": mean(top1), "std": pstdev(top1)}, "seeds": rows}
    return {"recipe": recipe, "made_of": seeds[0]["made_of"]} | figures


def report(record: Mapping[str, Any]) -> str:
    """The figures in Markdown."""
    environment, seeds, top1 = record["environment"], record["seeds"], record["top1"]
    versions, first = environment["versions"], seeds[0]
    processes = record["cpu_processes"]
    lines = [
        f"# `{record['recipe']}` on CIFAR-10 (JPEG copy)",
        "",
        f"`{environment['command']}`, {environment['started']}: {environment['gpu'] or environment['cpu']}, "
        f"{environment['cpu_count']} cores{f', {processes} processes' if processes else ''}; Python "
        f"{versions['python']}, PyTorch {versions['torch']}.",
        "",
        f"**{100 * top1['mean']:.1f} % ± {100 * top1['std']:.1f}** top-1 on {first['samples']:,} {record['images']}: "
        f"mean and standard deviation (of the population) over {len(seeds)} seed(s), by `fastvit evaluate`, of the "
        f"{first['weights']} weights after {first['epochs']:.1f} epochs ({first['steps']:,} steps, "
        f"{first['flops'] / 1e12:.1f} TFLOP by the engine's own count).",
        "",
        "| seed | top-1 | loss | minutes of training | images/s | fastest tenth | minutes at it | CPU minutes | load |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for seed in seeds:
        median_speed, fastest = seed["images_per_second"].values()
        cpu = "resumed" if seed["cpu_s"] is None else f"{seed['cpu_s'] / 60:.1f}"
        lines.append(
            f"| {seed['seed']} | {100 * seed['top1']:.2f} % | {seed['loss']:.3f} | {seed['training_s'] / 60:.1f} | "
            f"{median_speed:,.0f} | {fastest:,.0f} | {seed['images'] / fastest / 60:.1f} | {cpu} | "
            f"{seed['load_average'][0]:.1f}, {seed['load_average'][1]:.1f} |"
        )
    lines += [
        "",
        "Minutes of training are those of its steps, as the run counts them; other work on the machine makes them "
        "longer. Images/s are the median of the logged intervals, and the least of the fastest tenth of them, which "
        "says how long training takes if nothing else runs. CPU minutes are those of the whole command with its child "
        "processes: start, evaluations and checkpoints included. The load is that of the machine before and after; the "
        "run itself adds one for each process.",
        "",
        "The command of the first seed, with lists of shards in place of patterns:",
        "",
        "```bash",
        first["command"],
        "```",
        "",
    ]
    return "\n".join(lines)


def draw(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Accuracy during training: the mean of the seeds, and the range they span; the files written."""
    curves = [seed["curve"] for seed in record["seeds"]]
    epochs = [epoch for epoch, _ in curves[0]]
    points = [[100 * top1 for _, top1 in at] for at in zip(*curves, strict=True)]
    figure, axis = pyplot().subplots(figsize=(8, 4.2), layout="constrained")
    title_of(figure, f"{record['recipe']} on CIFAR-10 (JPEG copy)", machine(record))
    axis.grid(axis="y", color=HAIR, linewidth=0.8)
    axis.fill_between(
        epochs, [min(at) for at in points], [max(at) for at in points], color=OURS, alpha=0.2, linewidth=0
    )
    axis.plot(epochs, [mean(at) for at in points], color=OURS, marker="o", markersize=3.5, linewidth=1.6)
    last = f"{mean(points[-1]):.1f} %"
    axis.annotate(last, (epochs[-1], mean(points[-1])), (0, 7), textcoords="offset points", ha="right", color=INK)
    axis.set_xlim(left=0)
    axis.set_xlabel("epochs")
    axis.set_ylabel(f"top-1 on {record['images']} (%)")
    axis.set_title(f"mean and range of {len(curves)} seed(s)", loc="left", fontsize=9.5)
    return save(figure, folder, record["recipe"])


def main(arguments: Sequence[str] | None = None, command: Command = fastvit) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="shards train-* and test-*")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where RECIPE.json, .md, .svg, .png go")
    parser.add_argument("--recipe", metavar="RECIPE", default="cifar10_cpu")
    parser.add_argument("--seeds", metavar="N", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cpu-processes", metavar="N", type=int, help="of each training")
    parser.add_argument("--runs", metavar="RUNS", type=Path, help="folder of the runs, which is kept")
    parser.add_argument("--choose", action="store_true", help="hold out the last training shard, and measure there")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="a setting of every training")
    given = parser.parse_args(arguments)
    train, test = shards_of(given.folder, "train"), shards_of(given.folder, "test")
    if given.choose:
        train, test = train[:-1], train[-1:]
    setup = Setup(given.recipe, train, test, tuple(given.set), given.cpu_processes)
    words = list(sys.argv[1:] if arguments is None else arguments)
    named = {str(given.folder): "FOLDER", str(given.out): "DIR", str(given.runs): "RUNS"}
    environment = describe_machine(
        shlex.join(["python", "-m", "benchmarks.cifar10", *(named.get(w, w) for w in words)])
    )
    environment = {name: value for name, value in environment.items() if name not in ("hostname", "load_average")}
    record: dict[str, Any] = {"environment": environment, "cpu_processes": given.cpu_processes}
    record["images"] = "held-out training images" if given.choose else "test images"
    with tempfile.TemporaryDirectory() as scratch:
        runs = (given.runs or Path(scratch)).resolve()
        runs.mkdir(parents=True, exist_ok=True)
        experiment = Experiment(setup, runs, command)
        record |= summary(given.recipe, [experiment.measure(seed) for seed in given.seeds])
    publish(record, given.out, given.recipe, report, draw)


if __name__ == "__main__":
    main()
