"""What CIFAR-10 training with fewer tokens saves and what it reaches, at equal images and at equal FLOPs.

    python -m benchmarks.fewer_tokens FOLDER --out DIR [--runs RUNS] [--epochs 2] [--seeds 0 1 2] [--cpu-processes 2]

FOLDER has `train-*.tar` and `test-*.tar`, gzipped or not. Everything is done by `fastvit train` and `fastvit evaluate`
with the recipe `cifar10_cpu`, plain and with each option. FLOPs are those that the runs recorded, of what each step
computed. At equal FLOPs an option trains for as many steps as its savings pay for.
With --runs, a measurement that was interrupted continues: runs that are done are read, and a run is resumed.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, pstdev
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
from fastvit_engine.config import Config, load_config
from fastvit_engine.data.stream.batch_split import split_batch
from fastvit_engine.train.compute import Compute
from fastvit_engine.train.schedule import Schedule

NAME = "fewer_tokens"
RECIPE = "cifar10_cpu"
PLAIN = "plain"


@dataclass(frozen=True)
class Variant:
    """A way to train."""

    title: str
    settings: tuple[str, ...]
    at_equal_flops: bool = True  # also trained longer, for the FLOPs of plain training
    colour: str = OURS


VARIANTS = {
    PLAIN: Variant("plain", (), at_equal_flops=False, colour=INK),
    "patch_drop": Variant(
        "half of the patches dropped, until 80 %", ("tokens.patch_drop=0.5", "tokens.patch_drop_until=80%")
    ),
    "image_sizes": Variant(
        "16 px until 40 %, 24 px until 70 %", ("tokens.image_sizes=[[16, 40%], [24, 70%]]",), colour="#0f8a68"
    ),
    "drop_path_subset": Variant(
        "drop path 0.2, of a subset", ("model.drop_path=0.2", "model.drop_path_mode=subset"), colour="#c8590b"
    ),
    "drop_path_mask": Variant(
        "drop path 0.2, computed and discarded", ("model.drop_path=0.2",), at_equal_flops=False, colour="#8d887e"
    ),
    "packing": Variant(
        "16 to 64 patches, drawn, in one sequence",
        ("packing.max_patches=64", "packing.min_patches=16"),
        colour="#7a4fb5",
    ),
}
BUDGETS = {"images": "equal images", "flops": "equal FLOPs"}


@dataclass(frozen=True)
class Experiment:
    """All trainings, each of which leaves a record once it is measured."""

    shards: Shards
    runs: Runs
    epochs: float
    settings: tuple[str, ...] = ()  # of every training, over the recipe's

    def measure(self, name: str, budget: str, seed: int) -> dict[str, Any]:
        """The record of a run: read if it is there, otherwise that of a training, which may be resumed.

        Raises SystemExit if the record in the folder is of other settings.
        """
        data = self.runs.listed("train", self.shards.train), self.runs.listed("test", self.shards.test)
        settings = [f"data.train={data[0]}", f"data.eval={data[1]}", f"seed={seed}"]
        settings += self._settings(name, self.steps(name, budget))
        wanted = made_of(load_config(RECIPE, settings).config, self.shards.train)
        run = f"{name}-{budget}-{seed}"
        return keep(self.runs.folder / f"{run}.json", wanted, lambda: self._train(run, settings, data[1]))

    def steps(self, name: str, budget: str) -> int:
        """Of a run: those of the epochs, or those whose operations plain training takes for that."""
        config = self._config(PLAIN, 1000)
        samples = config.data.epoch_samples
        if samples is None:
            raise SystemExit(f"{RECIPE} does not say what an epoch is: --set data.train_samples=N")
        steps = max(1, round(self.epochs * samples / config.train.global_batch_size))
        if budget == "images":
            return steps
        return max(1, round(steps * self._flops_per_image(PLAIN) / self._flops_per_image(name)))

    def _flops_per_image(self, name: str) -> float:
        """On average over a run. Points of the run are shares of it, so that its length matters little."""
        config = self._config(name, 1000)
        schedule = Schedule(config, config.data.epoch_samples)
        compute = Compute(config, split_batch(config, self.runs.cpu_processes or 1))
        return compute.mean_per_image(schedule.phases, schedule.total_steps).computed

    def _config(self, name: str, steps: int) -> Config:
        return load_config(RECIPE, self._settings(name, steps)).config

    def _settings(self, name: str, steps: int) -> list[str]:
        duration = f"train.duration={steps} steps"
        return ["evaluate.every=null", *self.settings, *VARIANTS[name].settings, duration]  # measured at the end alone

    def _train(self, run: str, settings: Sequence[str], test: str) -> dict[str, Any]:
        started, version, load = datetime.now(UTC).isoformat(timespec="seconds"), commit(), os.getloadavg()[0]
        trained = self.runs.train(run, RECIPE, settings)
        evaluated = self.runs.command(["evaluate", str(trained.run), "--data", test, "--json"])
        found, last = json.loads(evaluated.output), trained.metrics.train[-1]
        return {
            "run": run,
            "started": started,
            "commit": version,
            "load_average": [load, os.getloadavg()[0]],  # before and after
            "command": trained.command,
            **{name: found[name] for name in ("samples", "top1", "loss")},
            "steps": last["step"],
            "images": last["samples"],
            "flops": last["flops"],
            "training_s": last["seconds"],
            "wall_s": trained.wall_s,
            "cpu_s": trained.cpu_s,
        }


def summary(runs: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of the table: means over the seeds, and the standard deviation (of the population) of the accuracy."""
    rows = []
    for (name, budget), seeds in runs.items():
        top1 = [seed["top1"] for seed in seeds]
        means = {key: mean(seed[key] for seed in seeds) for key in ("steps", "images", "flops", "training_s", "loss")}
        shown = [{key: value for key, value in seed.items() if key != "made_of"} for seed in seeds]
        of_variant = {"variant": name, "title": VARIANTS[name].title, "settings": VARIANTS[name].settings}
        rows.append(
            {**of_variant, "budget": budget, "top1": {"mean": mean(top1), "std": pstdev(top1)}, **means, "runs": shown}
        )
    plain = rows[0]
    for row in rows:
        row["flops_saved"] = 1 - row["flops"] / plain["flops"]
        row["time_saved"] = 1 - row["training_s"] / plain["training_s"]
        row["points_gained"] = 100 * (row["top1"]["mean"] - plain["top1"]["mean"])
    return rows


def report(record: Mapping[str, Any]) -> str:
    """The figures in Markdown."""
    environment, rows = record["environment"], record["rows"]
    versions, first, seeds = environment["versions"], rows[0]["runs"][0], len(rows[0]["runs"])
    processes = record["cpu_processes"]
    lines = [
        "# Fewer tokens, on CIFAR-10 (JPEG copy)",
        "",
        f"`{environment['command']}`, {environment['started']}: {environment['gpu'] or environment['cpu']}, "
        f"{environment['cpu_count']} cores{f', {processes} processes' if processes else ''}; Python "
        f"{versions['python']}, PyTorch {versions['torch']}.",
        "",
        f"`{RECIPE}` in {record['epochs']:g} epoch{'' if record['epochs'] == 1 else 's'}, {rows[0]['steps']:,.0f} "
        f"steps, plain and with each option. Top-1 on {first['samples']:,} test images by `fastvit evaluate`: mean and "
        f"standard deviation (of the population) over {seeds} seed{'s' if seeds > 1 else ''}. FLOPs are what the steps "
        "computed, by the engine's own count; minutes are those of the steps, and other work on the machine makes them "
        "longer. How many patches packed images have is known when they have been seen, and is less than was counted "
        "on: so packing stays below the FLOPs of the others.",
    ]
    for budget, title in BUDGETS.items():
        lines += [
            "",
            f"At {title}:",
            "",
            "| training | steps | TFLOP | FLOPs saved | minutes | time saved | top-1 | points |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [_line(row) for row in rows if row["budget"] == budget or row["variant"] == PLAIN]
    lines += ["", "The first command of each, with lists of shards in place of patterns:", "", "```bash"]
    lines += [row["runs"][0]["command"] for row in rows]
    return "\n".join([*lines, "```", ""])


def _line(row: Mapping[str, Any]) -> str:
    top1 = row["top1"]
    flops, time, points = (
        ("", "", "")
        if row["variant"] == PLAIN
        else (f"{100 * row['flops_saved']:.0f} %", f"{100 * row['time_saved']:.0f} %", f"{row['points_gained']:+.1f}")
    )
    return (
        f"| {row['title']} | {row['steps']:,.0f} | {row['flops'] / 1e12:.2f} | {flops} | "
        f"{row['training_s'] / 60:.1f} | {time} | {100 * top1['mean']:.1f} % ± {100 * top1['std']:.1f} | "
        f"{points} |"
    )


def draw(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Accuracy against the FLOPs spent: the seeds, and their mean; the files written."""
    figure, axis = pyplot().subplots(figsize=(8, 4.6), layout="constrained")
    title_of(figure, "Fewer tokens on CIFAR-10 (JPEG copy)", machine(record))
    axis.grid(axis="y", color=HAIR, linewidth=0.8)
    for name, variant in VARIANTS.items():
        own = [row for row in record["rows"] if row["variant"] == name]
        if not own:
            continue
        for row in own:
            spent, reached = (
                [scale * run[key] for run in row["runs"]] for key, scale in (("flops", 1e-12), ("top1", 100))
            )
            axis.scatter(spent, reached, s=10, color=variant.colour, alpha=0.4, linewidths=0)
        means = [(row["flops"] / 1e12, 100 * row["top1"]["mean"]) for row in own]
        axis.plot(*zip(*means, strict=True), marker="o", markersize=6, color=variant.colour, label=variant.title)
    axis.set_xlim(left=0)
    axis.set_xlabel("training compute (TFLOP)")
    axis.set_ylabel("top-1 on the test images (%)")
    axis.set_title(
        f"means of {len(record['rows'][0]['runs'])} seeds, and each seed; left: equal images, right: equal FLOPs",
        loc="left",
        fontsize=9.5,
    )
    axis.legend(frameon=False, fontsize=8.5)
    return save(figure, folder, NAME)


def main(arguments: Sequence[str] | None = None, command: Command = fastvit) -> None:
    parser = parser_of(__doc__, f"{NAME}.json, .md, .svg and .png")
    parser.add_argument("--epochs", metavar="N", type=float, default=2.0, help="of plain training (default: 2)")
    parser.add_argument("--seeds", metavar="N", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", metavar="NAME", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--cpu-processes", metavar="N", type=int, help="of each training")
    add_runs(parser)
    given = parser.parse_args(arguments)
    shards = Shards.of(given.folder)
    environment = environment_of(f"benchmarks.{NAME}", arguments, given)
    environment.pop("load_average")  # each run has its own
    record: dict[str, Any] = {"environment": environment, "cpu_processes": given.cpu_processes, "epochs": given.epochs}
    chosen = [PLAIN, *(name for name in VARIANTS if name in given.variants and name != PLAIN)]
    wanted = [
        (name, budget) for budget in BUDGETS for name in chosen if budget == "images" or VARIANTS[name].at_equal_flops
    ]
    with folder_of_runs(given.runs) as folder:
        experiment = Experiment(shards, Runs(folder, command, given.cpu_processes), given.epochs, tuple(given.set))
        # Every seed of all before the next one, so that a slow hour of the machine is nobody's alone.
        measured = {(seed, *which): experiment.measure(*which, seed) for seed in given.seeds for which in wanted}
    record["rows"] = summary({which: [measured[seed, *which] for seed in given.seeds] for which in wanted})
    publish(record, given.out, NAME, report, draw)


if __name__ == "__main__":
    main()
