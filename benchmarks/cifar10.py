"""The accuracy on CIFAR-10 that a recipe reaches from scratch with several seeds, and the time it takes.

    python -m benchmarks.cifar10 FOLDER --out DIR [--recipe cifar10_cpu] [--cpu-processes 2] [--seeds 0 1 2]

FOLDER has `train-*.tar` and `test-*.tar`, gzipped or not. Everything is done by `fastvit train` and `fastvit evaluate`.
With --runs, a measurement that was interrupted continues: seeds that are done are read, and a run is resumed.
With --choose, the last training shard is held out and takes the place of the test images: settings are chosen there.
"""

import json
import os
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
from benchmarks.recipe_runs import (
    Command,
    Runs,
    Shards,
    add_runs,
    environment_of,
    fastvit,
    folder_of_runs,
    keep,
    made_of,
    parser_of,
)
from fastvit_engine.config import load_config


@dataclass(frozen=True)
class Experiment:
    """The trainings of a recipe with several seeds, each of which leaves a record once it is measured."""

    recipe: str
    shards: Shards
    runs: Runs
    settings: tuple[str, ...] = ()  # of every training, over the recipe's

    def measure(self, seed: int) -> dict[str, Any]:
        """The record of a seed: read if it is there, otherwise that of a training, which may be resumed.

        Raises SystemExit if the record in the folder is of other settings.
        """
        data = self.runs.listed("train", self.shards.train), self.runs.listed("test", self.shards.test)
        settings = [f"data.train={data[0]}", f"data.eval={data[1]}", f"seed={seed}", *self.settings]
        config = load_config(self.recipe, settings).config
        samples = config.data.train_samples
        if samples is None:
            raise SystemExit(f"{self.recipe} does not say what an epoch is: --set data.train_samples=N")
        wanted = made_of(config, self.shards.train)
        return keep(
            self.runs.folder / f"seed-{seed}.json", wanted, lambda: self._train(seed, settings, data[1], samples)
        )

    def _train(self, seed: int, settings: Sequence[str], test: str, train_samples: int) -> dict[str, Any]:
        started, version, load = datetime.now(UTC).isoformat(timespec="seconds"), commit(), os.getloadavg()[0]
        trained = self.runs.train(f"seed-{seed}", self.recipe, settings)
        average = trained.run / "model_ema.safetensors"
        weights = average if average.exists() else trained.run
        evaluated = self.runs.command(["evaluate", str(weights), "--data", test, "--json"])
        found = json.loads(evaluated.output)
        training, evaluations = trained.metrics.train, trained.metrics.evaluations
        last, speeds = training[-1], [row["images_per_second"] for row in training]
        evaluation = "eval_ema" if weights == average else "eval"
        return {
            "seed": seed,
            "started": started,
            "commit": version,
            "load_average": [load, os.getloadavg()[0]],  # before and after
            "command": trained.command,
            **{name: found[name] for name in ("samples", "top1", "loss")},
            "weights": "averaged" if weights == average else "last",
            "steps": last["step"],
            "epochs": last["samples"] / train_samples,
            "images": last["samples"],
            "flops": last["samples"] * trained.environment["training_flops_per_image"],
            "training_s": last["seconds"],
            "evaluations_s": sum(row["seconds"] for row in evaluations),
            "images_per_second": {"median": median(speeds), "fastest tenth": quantiles(speeds, n=10)[-1]},
            "wall_s": trained.wall_s,
            "cpu_s": trained.cpu_s,
            "curve": [
                [row["step"] / last["step"] * last["samples"] / train_samples, row["top1"]]
                for row in evaluations
                if row["eval"] == evaluation
            ],
        }


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
    about = "one seed" if len(seeds) == 1 else f"mean and standard deviation of the population over {len(seeds)} seeds"
    spread = "" if len(seeds) == 1 else f" ± {100 * top1['std']:.1f}"
    lines = [
        f"# `{record['recipe']}` on CIFAR-10 (JPEG copy)",
        "",
        f"`{environment['command']}`, {environment['started']}: {environment['gpu'] or environment['cpu']}, "
        f"{environment['cpu_count']} cores{f', {processes} processes' if processes else ''}; Python "
        f"{versions['python']}, PyTorch {versions['torch']}.",
        "",
        f"**{100 * top1['mean']:.1f} %{spread}** top-1 on {first['samples']:,} {record['images']} ({about}), by "
        f"`fastvit evaluate`, of the {first['weights']} weights after {first['epochs']:.1f} epochs "
        f"({first['steps']:,} steps, {first['flops'] / 1e12:.1f} TFLOP by the engine's own count).",
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
    spread = "one seed" if len(curves) == 1 else f"mean and range of {len(curves)} seeds"
    axis.set_title(spread, loc="left", fontsize=9.5)
    return save(figure, folder, record["recipe"])


def main(arguments: Sequence[str] | None = None, command: Command = fastvit) -> None:
    parser = parser_of(__doc__, "RECIPE.json, .md, .svg and .png")
    parser.add_argument("--recipe", metavar="RECIPE", default="cifar10_cpu")
    parser.add_argument("--seeds", metavar="N", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cpu-processes", metavar="N", type=int, help="of each training")
    parser.add_argument("--choose", action="store_true", help="hold out the last training shard, and measure there")
    add_runs(parser)
    given = parser.parse_args(arguments)
    shards = Shards.of(given.folder)
    environment = environment_of("benchmarks.cifar10", arguments, given)
    environment.pop("load_average")  # each seed has its own
    record: dict[str, Any] = {"environment": environment, "cpu_processes": given.cpu_processes}
    record["images"] = "held-out training images" if given.choose else "test images"
    with folder_of_runs(given.runs) as folder:
        runs = Runs(folder, command, given.cpu_processes)
        chosen = shards.held_out() if given.choose else shards
        experiment = Experiment(given.recipe, chosen, runs, tuple(given.set))
        record |= summary(given.recipe, [experiment.measure(seed) for seed in given.seeds])
    publish(record, given.out, given.recipe, report, draw)


if __name__ == "__main__":
    main()
