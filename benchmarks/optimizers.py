"""Every kind of optimizer on the same small model of CIFAR-10, for the same steps, each at the best rate of a grid.

    python -m benchmarks.optimizers FOLDER --runs RUNS --out DIR [--kinds adamw muon ...] [--seeds 0 1 2]

FOLDER has `train-*.tar` and `test-*.tar`, gzipped or not. `fastvit train` trains recipe cifar10_cpu with each kind. For
each, learning rates are tried on all training shards but the last, which measures them; the grid is widened while the
best rate is at an end of those tried, up to 7 rates. The best then trains on all shards with every seed, and is
measured on the test images. Two trainings run at once, each in one process and on one thread.
Killed and started again with the same --runs, it continues: what is measured is read.
"""

import math
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import mean, median, pstdev, quantiles
from typing import Any, NamedTuple, get_args

from benchmarks.machine import commit
from benchmarks.plots import HAIR, machine, pyplot, save
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
from fastvit_engine.checkpoint.export import find_checkpoint
from fastvit_engine.config import load_config
from fastvit_engine.config.sections import OptimizerName
from fastvit_engine.files import read_json_lines

NAME, RECIPE = "optimizers", "cifar10_cpu"
KINDS: tuple[str, ...] = get_args(OptimizerName)
GRID = tuple(float(f"{digit}e{power}") for power in range(-7, 3) for digit in (1, 2, 5))
FIRST_RATES = {  # three neighbours on the grid, from common use; widened as needed
    "adamw": (2e-3, 5e-3, 1e-2),
    "sgd": (1e-1, 2e-1, 5e-1),
    "lion": (2e-4, 5e-4, 1e-3),
    "muon": (2e-3, 5e-3, 1e-2),
    "lamb": (1e-2, 2e-2, 5e-2),
    "adafactor": (2e-3, 5e-3, 1e-2),
}
MOST_RATES = 7
AT_ONCE = 2  # trainings
# The same for every kind; momentum and eps are the kind's own defaults.
SETTINGS = (
    *("optimizer.betas=[0.9, 0.99]", "optimizer.weight_decay=0"),  # decay does nothing in so few steps
    *("schedule.kind=linear", "schedule.warmup=10%"),
    *("train.log_every=10", "evaluate.every=null", "checkpoint.every=null", "observe.trackers=[]"),
    *("health.spike_threshold=null", "health.max_rewinds=0"),  # a rate that diverges has failed, and is not helped
)
COLOURS = ("#2a6fdb", "#7d828b", "#0f8a68", "#c8590b", "#8a4fbf", "#c62f3b")


class Training(NamedTuple):
    """One training; `tried`: on the held-out shard, to choose the rate."""

    kind: str
    rate: float
    seed: int
    tried: bool

    @property
    def name(self) -> str:
        return f"try-{self.kind}-{self.rate:g}" if self.tried else f"{self.kind}-{self.seed}"


@dataclass(frozen=True)
class Experiment:
    """All trainings, in one folder of runs, where each leaves a record once it is measured."""

    shards: Shards
    runs: Runs
    steps: int = 300
    settings: tuple[str, ...] = ()  # of every training, over the recipe's and SETTINGS
    say: Callable[[str], None] = print

    def measure(self, kinds: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
        """For each kind the rates tried, and what the best one reached with each seed."""
        tried: dict[str, dict[float, dict[str, Any]]] = {kind: {} for kind in kinds}
        rates: list[tuple[str, float]] = [(kind, rate) for kind in kinds for rate in FIRST_RATES[kind]]
        while rates:
            found = self._all([Training(kind, rate, 0, True) for kind, rate in rates])
            for (kind, rate), record in zip(rates, found, strict=True):
                tried[kind][rate] = record
            following = ((kind, next_rate(_top1(tried[kind]))) for kind in kinds)
            rates = [(kind, rate) for kind, rate in following if rate is not None]
        best = {kind: best_rate(_top1(tried[kind])) for kind in kinds}
        for kind in kinds:
            if "top1" not in tried[kind][best[kind]]:
                raise SystemExit(f"{kind} diverged at every rate that was tried: {tried[kind][best[kind]]['diverged']}")
        found = self._all([Training(kind, best[kind], seed, False) for kind in kinds for seed in seeds])
        return {
            kind: summary(tried[kind], best[kind], found[place * len(seeds) : (place + 1) * len(seeds)])
            for place, kind in enumerate(kinds)
        }

    def _all(self, trainings: Sequence[Training]) -> list[dict[str, Any]]:
        """The records of these trainings, of which AT_ONCE run at a time."""
        shards = {tried: self.shards.held_out() if tried else self.shards for tried in {t.tried for t in trainings}}
        data = {tried: self._data(of, "tries" if tried else "all") for tried, of in shards.items()}

        def measured(training: Training) -> dict[str, Any]:
            return self._measured(training, shards[training.tried], data[training.tried])

        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(measured, trainings))

    def _data(self, shards: Shards, which: str) -> list[str]:
        train, test = (self.runs.listed(f"{split}-{which}", getattr(shards, split)) for split in ("train", "test"))
        return [f"data.train={train}", f"data.eval={test}"]

    def _measured(self, training: Training, shards: Shards, data: Sequence[str]) -> dict[str, Any]:
        """The record of a training: read if it is there.

        Raises SystemExit if the record in the folder is of other settings or shards.
        """
        settings = [*data, f"seed={training.seed}", f"train.duration={self.steps} steps", *SETTINGS, *self.settings]
        settings += [f"optimizer.kind={training.kind}", f"optimizer.learning_rate={training.rate:g}"]
        wanted = made_of(load_config(RECIPE, settings).config, shards.train)
        wanted["test_shards"] = [Path(shard).name for shard in shards.test]
        path = self.runs.folder / f"{training.name}.json"
        record = keep(path, wanted, lambda: self._train(training, settings))
        reached = f"top-1 {100 * record['top1']:.1f} %" if "top1" in record else "diverged"
        self.say(f"{training.name}: {reached} at a learning rate of {training.rate:g}")
        return record

    def _train(self, training: Training, settings: Sequence[str]) -> dict[str, Any]:
        record: dict[str, Any] = {"kind": training.kind, "learning_rate": training.rate, "seed": training.seed}
        record |= {"started": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
        load = os.getloadavg()[0]
        try:
            trained = self.runs.train(training.name, RECIPE, settings)
        except subprocess.CalledProcessError:
            if (why := divergence(self.runs.folder / training.name)) is None:
                raise
            return record | {"diverged": why}
        rows, evaluation = trained.metrics.train, trained.metrics.evaluations[-1]
        batch = trained.environment["global_batch_size"]
        seconds = [batch / row["images_per_second"] for row in rows[1:]]  # the first waits for the workers to start
        updates = [batch / row["images_per_second"] * row["update"] for row in rows[1:]]
        return record | {
            "command": trained.command,
            "load_average": [load, os.getloadavg()[0]],  # before and after
            **{name: evaluation[name] for name in ("samples", "top1", "loss")},  # of its evaluation at the end
            "steps": rows[-1]["step"],
            "images": rows[-1]["samples"],
            "training_s": rows[-1]["seconds"],
            "seconds_per_step": {"median": median(seconds), "fastest tenth": quantiles(seconds, n=10)[0]},
            "seconds_per_update": median(updates),
            "state_bytes_per_parameter": state_bytes_per_parameter(trained.run),
            "curve": [[row["step"], row["loss"]] for row in rows],  # of one batch each
        }


def _top1(tried: Mapping[float, Mapping[str, Any]]) -> dict[float, float]:
    """By rate, what it reached; less than nothing if it diverged."""
    return {rate: record.get("top1", -1.0) for rate, record in tried.items()}


def best_rate(top1: Mapping[float, float]) -> float:
    """The rate with the highest accuracy; the lowest of several."""
    return max(sorted(top1), key=top1.__getitem__)


def next_rate(top1: Mapping[float, float]) -> float | None:
    """The rate to try next: the neighbour on the grid of a best rate that is at an end of those tried.

    None if the best is not at an end, MOST_RATES have been tried, or the grid ends.
    """
    best, place = best_rate(top1), GRID.index(best_rate(top1))
    if len(top1) >= MOST_RATES or min(top1) < best < max(top1):
        return None
    place += -1 if best == min(top1) else 1
    return GRID[place] if 0 <= place < len(GRID) else None


def divergence(run: Path) -> str | None:
    """What a run that failed says of a loss, gradient or weight that was not finite; None if it failed otherwise."""
    events = run / "events.jsonl"
    rows = list(read_json_lines(events)) if events.exists() else []
    return next((row["message"] for row in reversed(rows) if row.get("event") == "anomaly"), None)


def state_bytes_per_parameter(run: Path) -> float:
    """Bytes of all tensors of the optimizer in a run's last checkpoint, over the parameters that learn."""
    manifest = find_checkpoint(str(run)).read_manifest()
    kinds = manifest.kinds - {"weight", "ema", "buffer"}
    stored = sum(t.nbytes for file in manifest.files.values() for kind, _, t in file.tensors if kind in kinds)
    return stored / sum(math.prod(shape) for name, shape in manifest.parameters.items() if name not in manifest.frozen)


def summary(
    tried: Mapping[float, Mapping[str, Any]], rate: float, seeds: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The figures of a kind: the rates, and mean and standard deviation (of the population) over the seeds.

    Raises SystemExit if a seed diverged: the mean of the others would say too much.
    """
    for seed in seeds:
        if "top1" not in seed:
            raise SystemExit(
                f"{seed['kind']} diverged with seed {seed['seed']} at its best rate, {rate:g}: {seed['diverged']}"
            )
    rates, top1 = sorted(tried), [seed["top1"] for seed in seeds]
    return {
        "tries": [{"learning_rate": rate, "top1": tried[rate].get("top1")} for rate in rates],  # None: diverged
        "learning_rate": rate,
        "at_end_of_tries": rate in (rates[0], rates[-1]),
        "top1": {"mean": mean(top1), "std": pstdev(top1)},
        "seconds_per_step": {
            name: median(seed["seconds_per_step"][name] for seed in seeds) for name in ("median", "fastest tenth")
        },
        "seconds_per_update": median(seed["seconds_per_update"] for seed in seeds),
        "state_bytes_per_parameter": seeds[0]["state_bytes_per_parameter"],
        "seeds": [{name: value for name, value in seed.items() if name != "made_of"} for seed in seeds],
        "made_of": seeds[0]["made_of"],
    }


def report(record: Mapping[str, Any]) -> str:
    """The figures in Markdown."""
    environment, kinds = record["environment"], record["kinds"]
    versions, first = environment["versions"], next(iter(kinds.values()))
    seeds, model, batch = first["seeds"], first["made_of"]["model"], first["made_of"]["train"]["global_batch_size"]
    lines = [
        "# Optimizers on CIFAR-10 (JPEG copy)",
        "",
        f"`{environment['command']}`, {environment['started']}: {environment['cpu']}, {environment['cpu_count']} "
        f"cores, {AT_ONCE} trainings at once on one thread each; Python {versions['python']}, PyTorch "
        f"{versions['torch']}.",
        "",
        f"`{RECIPE}` ({model['name']}, width {model['width']}, depth {model['depth']}) for {record['steps']:,} steps "
        f"of {batch} images, {seeds[0]['images']:,} in all, with each optimizer. Top-1 on {seeds[0]['samples']:,} test "
        f"images: mean and standard deviation (of the population) over {len(seeds)} seed(s).",
        "",
        "| optimizer | top-1 | of each seed | learning rate | seconds per step | fastest tenth | of it the update | "
        "bytes of state per parameter |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for kind, found in kinds.items():
        step, top1 = found["seconds_per_step"], found["top1"]
        each = ", ".join(f"{100 * seed['top1']:.1f}" for seed in found["seeds"])
        lines.append(
            f"| `{kind}` | {100 * top1['mean']:.1f} % ± {100 * top1['std']:.1f} | {each} | "
            f"{found['learning_rate']:g} | "
            f"{step['median']:.3f} | {step['fastest tenth']:.3f} | {found['seconds_per_update']:.4f} | "
            f"{found['state_bytes_per_parameter']:.2f} |"
        )
    lines += [
        "",
        "Seconds per step are medians of the logged intervals, and those of the fastest tenth of them, for a machine "
        "that does nothing else; the update is the part of the median one in which gradients are checked and the "
        "optimizer works. Bytes of state are those of all tensors that the optimizer holds at the end, without the "
        "weights.",
        "",
        "Learning rates tried, and their top-1 on the last training shard, which was held out, with seed 0. No test "
        "image chose anything:",
        "",
        *(_tries(kind, found) for kind, found in kinds.items()),
        "",
        "The same for all: " + ", ".join(f"`{setting}`" for setting in SETTINGS[:4]) + ". The command of one training, "
        "with lists of shards in place of patterns:",
        "",
        "```bash",
        seeds[0]["command"],
        "```",
        "",
    ]
    return "\n".join(lines)


def _tries(kind: str, found: Mapping[str, Any]) -> str:
    reached = ("diverged" if one["top1"] is None else f"{100 * one['top1']:.1f} %" for one in found["tries"])
    listed = ", ".join(f"{one['learning_rate']:g}: {top1}" for one, top1 in zip(found["tries"], reached, strict=True))
    end = "; **the best is at an end of those tried**" if found["at_end_of_tries"] else ""
    return f"* `{kind}`: {listed}{end}"


def draw(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """The training loss at the best rates, and the accuracy of every rate that was tried; the files written."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    title_of(figure, "Optimizers on CIFAR-10 (JPEG copy)", machine(record))
    for place, (kind, found) in enumerate(record["kinds"].items()):
        colour = COLOURS[place % len(COLOURS)]
        curves = [seed["curve"] for seed in found["seeds"]]
        losses = [mean(loss for _, loss in at) for at in zip(*curves, strict=True)]
        left.plot([step for step, _ in curves[0]], losses, color=colour, linewidth=1.5, label=kind)
        tries = [one for one in found["tries"] if one["top1"] is not None]
        rates, top1 = [one["learning_rate"] for one in tries], [100 * one["top1"] for one in tries]
        right.plot(rates, top1, color=colour, marker="o", markersize=3.5, linewidth=1.5, label=kind)
    for axis, what in ((left, "at the best rate, mean of the seeds"), (right, "tries, one seed each")):
        axis.grid(axis="y", color=HAIR, linewidth=0.8)
        axis.set_title(what, loc="left", fontsize=9.5)
    left.set_xlabel("steps")
    left.set_ylabel("training loss of a batch (nats)")
    left.legend(frameon=False, fontsize=8.5)
    right.set_xscale("log")
    right.set_xlabel("learning rate")
    right.set_ylabel("top-1 on held-out training images (%)")
    return save(figure, folder, NAME)


ONE_THREAD = partial(fastvit, OMP_NUM_THREADS="1")


def main(arguments: Sequence[str] | None = None, command: Command = ONE_THREAD) -> None:
    parser = parser_of(__doc__, f"{NAME}.json, .md, .svg and .png")
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=list(KINDS), help="default: all")
    parser.add_argument("--seeds", metavar="N", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", metavar="N", type=int, default=300, help="of each training (default: 300)")
    add_runs(parser)
    given = parser.parse_args(arguments)
    environment = environment_of(f"benchmarks.{NAME}", arguments, given)
    environment.pop("load_average")  # each training has its own
    record: dict[str, Any] = {"environment": environment, "steps": given.steps, "settings": list(SETTINGS)}
    shards = Shards.of(given.folder)
    with folder_of_runs(given.runs) as folder:
        experiment = Experiment(shards, Runs(folder, command, 1), given.steps, tuple(given.set))
        record["kinds"] = experiment.measure([*dict.fromkeys(given.kinds)], [*dict.fromkeys(given.seeds)])
    publish(record, given.out, NAME, report, draw)


if __name__ == "__main__":
    main()
