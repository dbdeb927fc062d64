"""Pretraining at 32 pixels and fine-tuning at 48 against training at 48 from scratch, for the same FLOPs, on CIFAR-10.

    python -m benchmarks.resolution FOLDER --out DIR [--pretrain-steps N] [--finetune-steps N] [--seeds 3]

FOLDER has `train-*.tar` and `test-*.tar`, gzipped or not. Everything is done by `fastvit train` and `fastvit evaluate`,
and FLOPs are those that each run recorded. Each side first tries as many learning rates as the other, with a third of
the steps, on all training shards but the last, which measures them. The test images choose nothing.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from benchmarks.machine import commit
from benchmarks.plots import OURS, machine, pyplot, save
from benchmarks.plots import head as title_of
from benchmarks.publish import publish
from benchmarks.recipe_runs import Command, Ran, Runs, Shards, environment_of, fastvit, folder_of_runs, parser_of
from fastvit_engine.config import load_config
from fastvit_engine.models import computed_flops

SIDES = {"two": "32, then 48 pixels", "one": "48 pixels from scratch"}
NAME = "resolution"
_PRETRAIN = ("cifar10_cpu",)  # a recipe and settings over it
_FINETUNE = ("finetune_cifar10_cpu",)
_FROM_SCRATCH = ("cifar10_cpu", "model.image_size=48", "data.eval_transform=fast")

# Not the recipe's model and optimizer: three tries and three seeds of both sides take less than an hour.
SMALL = (
    *("model.name=Ti/8", "model.width=96", "model.heads=3", "model.pos_embed=learned"),
    *("data.mean=[0.5, 0.5, 0.5]", "data.std=[0.5, 0.5, 0.5]"),
    *("train.global_batch_size=128", "optimizer.kind=adamw", "optimizer.betas=[0.9, 0.999]"),
    *("schedule.kind=cosine", "schedule.warmup=10%"),
    *("evaluate.every=25%", "checkpoint.every=50%"),
)


@dataclass(frozen=True)
class Setup:
    """What is compared. Learning rates are tried in turn; one alone is taken without a try."""

    shards: Shards
    pretrain_steps: int
    finetune_steps: int
    seeds: int = 3
    model: tuple[str, ...] = SMALL  # of the pretraining and of the run from scratch
    settings: tuple[str, ...] = ()  # of every training
    pretrain_rate: float = 2e-3
    finetune_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    scratch_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)

    def steps(self, share: float = 1.0) -> tuple[int, int, int]:
        """Steps of pretraining, of fine-tuning, and of training from scratch with the FLOPs of both, or a step more."""
        small, large = (self._flops_per_step(size) for size in (32, 48))
        pretrain, finetune = (max(1, round(share * steps)) for steps in (self.pretrain_steps, self.finetune_steps))
        return pretrain, finetune, finetune + math.ceil(pretrain * small / large)

    def _flops_per_step(self, image_size: int) -> int:
        settings = [*self.model, *self.settings, f"model.image_size={image_size}"]
        config = load_config("cifar10_cpu", settings).config
        return computed_flops(config.model) * config.train.global_batch_size


@dataclass
class Phase:
    """One training of a side, and what it says of itself."""

    run: Path
    command: str
    wall_s: float
    cpu_s: float
    flops: float
    top1: float  # of its last evaluation
    curve: list[tuple[float, float]] = field(default_factory=list)  # FLOPs, top-1 on data.eval


@dataclass
class Experiment:
    """All trainings of both sides, one after the other, in one folder of runs."""

    setup: Setup
    runs: Runs

    def train(
        self, of: Sequence[str], name: str, steps: int, rate: float, seed: int, tried: bool, init: Path | None = None
    ) -> Phase:
        """Runs one training; `tried`: the last training shard is its evaluation data."""
        setup, which = self.setup, "tries" if tried else "all"
        shards = setup.shards.held_out() if tried else setup.shards
        data = {"train": shards.train, "eval": shards.test[:1]}
        settings = [*of[1:], *(f"data.{split}={self.runs.listed(f'{split}-{which}', data[split])}" for split in data)]
        settings += [f"train.duration={steps} steps", f"optimizer.learning_rate={rate:g}", f"seed={seed}"]
        settings += [*(setup.model if init is None else ()), *setup.settings]
        options = () if init is None else ("--init", str(init))
        trained = self.runs.train(name, of[0], settings, options=options, resume=False)
        batch, per_image = (trained.environment[key] for key in ("global_batch_size", "training_flops_per_image"))
        evaluations = trained.metrics.evaluations
        curve = [(row["step"] * batch * per_image, row["top1"]) for row in evaluations]
        flops = trained.metrics.train[-1]["step"] * batch * per_image
        ran = trained.ran
        return Phase(trained.run, trained.command, ran.wall_s, ran.cpu_s, flops, evaluations[-1]["top1"], curve)

    def tries(self) -> tuple[dict[str, Any], float, float]:
        """What each learning rate reached on the last training shard, and the best of either side."""
        setup = self.setup
        if len(setup.finetune_rates) == len(setup.scratch_rates) == 1:
            return {}, setup.finetune_rates[0], setup.scratch_rates[0]
        pretrain, finetune, scratch = setup.steps(1 / 3)
        first = self.train(_PRETRAIN, "try-32", pretrain, setup.pretrain_rate, 0, True)
        two, one = {}, {}
        for rate in setup.finetune_rates:
            two[rate] = self.train(_FINETUNE, f"try-32-48-{rate:g}", finetune, rate, 0, True, first.run).top1
        for rate in setup.scratch_rates:
            one[rate] = self.train(_FROM_SCRATCH, f"try-48-{rate:g}", scratch, rate, 0, True).top1
        record = {"steps": {"pretrain": pretrain, "finetune": finetune, "scratch": scratch}, "seed": 0}
        return record | {"two": two, "one": one}, max(two, key=two.__getitem__), max(one, key=one.__getitem__)

    def measure(self) -> dict[str, Any]:
        """Both sides with every seed, and what `fastvit evaluate` says of them on all test images."""
        tried, finetune_rate, scratch_rate = self.tries()
        pretrain, finetune, scratch = self.setup.steps()
        trained: dict[str, list[list[Phase]]] = {side: [] for side in SIDES}
        for seed in range(self.setup.seeds):
            first = self.train(_PRETRAIN, f"32-{seed}", pretrain, self.setup.pretrain_rate, seed, False)
            second = self.train(_FINETUNE, f"32-48-{seed}", finetune, finetune_rate, seed, False, first.run)
            trained["two"].append([first, second])
            trained["one"].append([self.train(_FROM_SCRATCH, f"48-{seed}", scratch, scratch_rate, seed, False)])
        tests = self.runs.listed("test", self.setup.shards.test)
        sides = {}
        for side, seeds in trained.items():
            models = [str(phases[-1].run) for phases in seeds]
            ran = self.runs.command(["evaluate", *models, "--data", tests, "--json"])
            sides[side] = _side(seeds, json.loads(ran.output), ran)
        rates = {"pretrain": self.setup.pretrain_rate, "finetune": finetune_rate, "scratch": scratch_rate}
        steps = {"pretrain": pretrain, "finetune": finetune, "scratch": scratch}
        return {"tries": tried, "learning_rates": rates, "steps": steps, "sides": sides}


def _side(seeds: Sequence[Sequence[Phase]], found: Mapping[str, Any], evaluation: Ran) -> dict[str, Any]:
    """The record of one side: every run, and means and standard deviations (of the population) over the seeds."""
    measured = found.get("models", [found])  # one model alone is not in a list
    runs = []
    for seed, (phases, figures) in enumerate(zip(seeds, measured, strict=True)):
        row: dict[str, Any] = {"seed": seed, **{name: figures[name] for name in ("samples", "top1", "loss")}}
        row |= {name: sum(getattr(phase, name) for phase in phases) for name in ("flops", "wall_s", "cpu_s")}
        row["phases"] = [asdict(phase) | {"run": phase.run.name} for phase in phases]
        runs.append(row)
    return {
        "top1": {"mean": mean(row["top1"] for row in runs), "std": pstdev(row["top1"] for row in runs)},
        "evaluation": {"wall_s": evaluation.wall_s, "cpu_s": evaluation.cpu_s},
        "runs": runs,
    }


def report(record: Mapping[str, Any]) -> str:
    """The figures in Markdown."""
    environment, steps, rates = record["environment"], record["steps"], record["learning_rates"]
    versions, load, sides = environment["versions"], environment["load_average"], record["sides"]
    runs = sides["two"]["runs"]
    lines = [
        "# The same FLOPs at two resolutions, on CIFAR-10 (JPEG copy)",
        "",
        f"`{environment['command']}`, {environment['started']}: {environment['cpu']}, {environment['cpu_count']} cores,"
        f" {record['processes']} processes; Python {versions['python']}, PyTorch {versions['torch']}; load average "
        f"{load[0]:.2f} at the start and {record['load_average_after']:.2f} at the end.",
        "",
        f"Top-1 on all {runs[0]['samples']:,} test images at 48 pixels, by `fastvit evaluate`; mean and standard "
        f"deviation (of the population) over {len(runs)} seed(s). FLOPs are the engine's own count. Times are those of "
        "whole `fastvit train` commands: start, evaluations and checkpoints included.",
        "",
        "| training | steps | learning rate | TFLOP | top-1 | of each seed | CPU seconds per run | seconds per run |",
        "|---|---:|---:|---:|---:|---|---:|---:|",
    ]
    cells = {
        "two": (f"{steps['pretrain']:,} + {steps['finetune']:,}", f"{rates['pretrain']:g}, {rates['finetune']:g}"),
        "one": (f"{steps['scratch']:,}", f"{rates['scratch']:g}"),
    }
    for side, title in SIDES.items():
        rows, top1 = sides[side]["runs"], sides[side]["top1"]
        each = ", ".join(f"{100 * row['top1']:.1f}" for row in rows)
        average = [mean(row[name] for row in rows) for name in ("flops", "cpu_s", "wall_s")]
        lines.append(
            f"| {title} | {cells[side][0]} | {cells[side][1]} | {average[0] / 1e12:.2f} | {100 * top1['mean']:.1f} % ± "
            f"{100 * top1['std']:.1f} | {each} | {average[1]:.0f} | {average[2]:.0f} |"
        )
    lines += ["", verdict(record)]
    if record["tries"]:
        lines += ["", _tries(record["tries"], rates["pretrain"])]
    lines += ["", "The commands of the first seed, with lists of shards in place of patterns:", "", "```bash"]
    lines += [phase["command"] for side in SIDES for phase in sides[side]["runs"][0]["phases"]]
    return "\n".join([*lines, "```", ""])


def verdict(record: Mapping[str, Any]) -> str:
    """What the figures say of the claim."""
    two, one = (record["sides"][side] for side in ("two", "one"))
    gain = 100 * (two["top1"]["mean"] - one["top1"]["mean"])
    apart = min(row["top1"] for row in two["runs"]) > max(row["top1"] for row in one["runs"])
    flops = [mean(row["flops"] for row in side["runs"]) for side in (two, one)]
    every = "every run of it above every run from scratch" if apart else "the runs of both overlap"
    outcome = f"{abs(gain):.1f} points {'better' if gain > 0 else 'worse'}"
    return (
        f"Pretraining at 32 and fine-tuning at 48 pixels is {outcome} than training at 48 from scratch with "
        f"{100 * flops[0] / flops[1]:.2f} % of its FLOPs; {every}."
    )


def _tries(tried: Mapping[str, Any], pretrain_rate: float) -> str:
    steps = tried["steps"]
    listed = {
        side: ", ".join(f"{float(rate):g}: {100 * top1:.1f} %" for rate, top1 in tried[side].items()) for side in SIDES
    }
    return (
        f"Learning rates tried before, with {steps['pretrain']} + {steps['finetune']} and {steps['scratch']} steps, on "
        f"all training shards but the last, which gave these top-1: fine-tuning {listed['two']}; from scratch "
        f"{listed['one']}. Pretraining has {pretrain_rate:g}, without a try."
    )


def draw(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Accuracy against the FLOPs spent, a line per run; the files written."""
    figure, axis = pyplot().subplots(figsize=(8, 4.6), layout="constrained")
    title_of(figure, "The same FLOPs at two resolutions, CIFAR-10 (JPEG copy)", machine(record))
    for side, colour in (("two", OURS), ("one", "#8d887e")):
        for row in record["sides"][side]["runs"]:
            spent, points = 0.0, []
            for phase in row["phases"]:
                points.append([(spent + flops, top1) for flops, top1 in phase["curve"]])
                spent += phase["flops"]
            for phase, style in zip(points, ("--", "-") if len(points) == 2 else ("-",), strict=True):
                label = {"--": "32 pixels", "-": "48 pixels, fine-tuned"}[style] if side == "two" else SIDES["one"]
                axis.plot(
                    [flops / 1e12 for flops, _ in phase],
                    [100 * top1 for _, top1 in phase],
                    style,
                    marker="o",
                    markersize=3,
                    color=colour,
                    label=label if row["seed"] == 0 else None,
                )
    axis.set_xlabel("training compute (TFLOP)")
    axis.set_ylabel("top-1 on the first test shard (%)")
    axis.legend(frameon=False, fontsize=8.5)
    return save(figure, folder, NAME)


def main(arguments: Sequence[str] | None = None, command: Command = fastvit) -> None:
    parser = parser_of(__doc__, f"{NAME}.json, .md, .svg and .png")
    parser.add_argument("--pretrain-steps", metavar="N", type=int, default=1400)
    parser.add_argument("--finetune-steps", metavar="N", type=int, default=400)
    parser.add_argument("--seeds", metavar="N", type=int, default=3)
    parser.add_argument("--processes", metavar="N", type=int, default=2, help="--cpu-processes of each training")
    parser.add_argument("--finetune-rates", metavar="X", type=float, nargs="+", default=list(Setup.finetune_rates))
    parser.add_argument("--scratch-rates", metavar="X", type=float, nargs="+", default=list(Setup.scratch_rates))
    given = parser.parse_args(arguments)
    if len(given.finetune_rates) != len(given.scratch_rates):
        parser.error("both sides take the same number of learning rates")
    setup = Setup(
        shards=Shards.of(given.folder),
        pretrain_steps=given.pretrain_steps,
        finetune_steps=given.finetune_steps,
        seeds=given.seeds,
        settings=tuple(given.set),
        finetune_rates=tuple(given.finetune_rates),
        scratch_rates=tuple(given.scratch_rates),
    )
    record: dict[str, Any] = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
    record |= {"environment": environment_of(f"benchmarks.{NAME}", arguments, given), "processes": given.processes}
    with folder_of_runs(None) as folder:
        record |= Experiment(setup, Runs(folder, command, given.processes)).measure()
    record["load_average_after"] = os.getloadavg()[0]
    publish(record, given.out, NAME, report, draw)


if __name__ == "__main__":
    main()
