"""Pretrained features against random ones: a linear probe, and few-shot classifiers on the same architecture.

    python -m benchmarks.probe MODEL FOLDER --out DIR [--image-size 98] [--steps 48] [--seeds 3]

MODEL is what `--init` takes; FOLDER has shards as `fastvit data make` writes them, of which the first for training and
the first for evaluation are used. Everything is done by `fastvit train probe`, `fastvit evaluate` and
`fastvit fewshot`. A seed of the random features is another initialisation, which one step of a probe leaves as it is; a
seed of the probe is another order and other crops.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from benchmarks.machine import commit
from benchmarks.publish import publish
from benchmarks.recipe_runs import Command, fastvit
from benchmarks.step_overhead import describe_machine
from fastvit_engine.config import load_config
from fastvit_engine.train.first_weights import fill_in

NAME = "probe"
_SHAPE = ("name", "pool", "head", "activation", "layer_norm_eps", "layer_scale", "width", "depth", "heads", "mlp_dim")


def shape_of(model: str) -> list[str]:
    """The settings that build the architecture of some weights from nothing."""
    resolved = load_config("probe", {"init.from": model})
    config = fill_in(resolved, None, resume=False).apply(resolved).config
    values = {f"model.{name}": getattr(config.model, name) for name in _SHAPE}
    values |= {"data.mean": list(config.data.mean), "data.std": list(config.data.std)}
    told = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return [f"{name}={told[name]}" for name, value in values.items() if value is not None]


def measure(model: str, folder: Path, given: argparse.Namespace, runs: Path, command: Command) -> dict[str, Any]:
    """Top-1 of the probes, and few-shot figures of the pretrained and of random weights."""
    train, evaluation = (str(folder / f"{split}-000000.tar") for split in ("train", "eval"))
    shared = [f"model.image_size={given.image_size}", f"model.num_classes={given.classes}", "train.precision=fp32"]
    shared += [f"data.train={train}", "data.num_workers=1", "data.eval_crop=1.0", *given.set]
    shared += ["train.global_batch_size=64", "checkpoint.every=null"]
    sides: dict[str, Any] = {}
    for side in ("pretrained", "random"):
        steps = given.steps if side == "pretrained" else 1
        probes, commands, cpu, wall = [], [], [], []
        for seed in range(given.seeds):
            settings = [*shared, f"train.duration={steps} steps", f"seed={seed}"]
            settings += [f"optimizer.learning_rate={given.rate}"]
            weights = ["--init", model] if side == "pretrained" else []
            settings += ["init.interpolation=bicubic"] if side == "pretrained" else shape_of(model)
            words = ["train", "probe", *weights, *(word for setting in settings for word in ("--set", setting))]
            words += ["--cpu-processes", str(given.processes), "--out", str(runs / f"{side}-{seed}")]
            ran = command(words)
            cpu.append(ran.cpu_s)
            wall.append(ran.wall_s)
            probes.append(str(runs / f"{side}-{seed}"))
            commands.append(_shown(words, runs, folder, model))
        # one backbone, so that fewshot's own seeds choose its images; of the random ones, each is measured
        fewshot = []
        for probe in probes if side == "random" else probes[:1]:
            words = ["fewshot", probe, "--train", train, "--eval", evaluation, "--json", "--seeds", str(given.seeds)]
            fewshot.append(json.loads(command(words).output)["shots"])
            commands.append(_shown(words, runs, folder, model))
        sides[side] = {
            "fewshot": {
                shots: _figures([top1 for found in fewshot for top1 in found[shots]["seeds"]]) for shots in fewshot[0]
            },
            "commands": commands,
        }
        if side == "pretrained":
            measured = json.loads(command(["evaluate", *probes, "--data", evaluation, "--json"]).output)
            rows = measured.get("models", [measured])  # one model alone is not in a list
            sides[side] |= {"samples": rows[0]["samples"], "cpu_s": cpu, "wall_s": wall}
            sides[side]["probe"] = _figures([row["top1"] for row in rows])
    return sides


def _figures(top1: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (of the population) and each value."""
    return {"mean": mean(top1), "std": pstdev(top1), "each": list(top1)}


def _shown(words: Sequence[str], runs: Path, folder: Path, model: str) -> str:
    """A command without the folders of this machine."""
    told = [word.replace(f"{runs}/", "").replace(str(folder), "FOLDER").replace(model, "MODEL") for word in words]
    return shlex.join(["fastvit", *told])


def report(record: Mapping[str, Any]) -> str:
    """The figures in Markdown."""
    environment, sides = record["environment"], record["sides"]
    load, versions = environment["load_average"], environment["versions"]
    shots = list(sides["pretrained"]["fewshot"])
    lines = [
        "# A linear probe and few-shot classifiers on pretrained and on random features",
        "",
        f"`{environment['command']}`, {environment['started']}: {environment['cpu']}, {environment['cpu_count']} cores;"
        f" Python {versions['python']}, PyTorch {versions['torch']}; load average {load[0]:.2f} at the start.",
        "",
        record["note"],
        "",
        f"Top-1 on {sides['pretrained']['samples']:,} images: mean and standard deviation (of the population). The "
        f"probe saw {record['steps']} steps of 64 images, with {record['seeds']} seed(s); few-shot figures are of "
        f"{len(sides['pretrained']['fewshot'][shots[0]]['each'])} choice(s) of images on the pretrained "
        f"features, and of as many on each of {record['seeds']} random initialisation(s).",
        "",
        f"| features | linear probe | {' | '.join(f'{count}-shot' for count in shots)} | CPU seconds per probe |",
        f"|---|---:|{'---:|' * len(shots)}---:|",
    ]
    for side, found in sides.items():
        probe = _percent(found["probe"]) if "probe" in found else ""
        cells = [probe, *(_percent(found["fewshot"][count]) for count in shots)]
        cells.append(f"{mean(found['cpu_s']):.0f}" if probe else "")
        lines.append(f"| {side} | {' | '.join(cells)} |")
    lines += ["", "The commands of the first seed:", "", "```bash"]
    for found in sides.values():
        lines += [next(line for line in found["commands"] if word in line) for word in (" train ", " fewshot ")]
    return "\n".join([*lines, "```", ""])


def _percent(figures: Mapping[str, Any]) -> str:
    return f"{100 * figures['mean']:.1f} % ± {100 * figures['std']:.1f}"


def main(arguments: Sequence[str] | None = None, command: Command = fastvit) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="pretrained weights, as --init takes them")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="shards train-000000.tar and eval-000000.tar")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where probe.json and .md go")
    parser.add_argument("--note", metavar="TEXT", default="", help="where weights and images come from")
    parser.add_argument("--classes", metavar="N", type=int, default=10)
    parser.add_argument("--image-size", metavar="N", type=int, default=98)
    parser.add_argument("--steps", metavar="N", type=int, default=48)
    parser.add_argument("--rate", metavar="X", type=float, default=0.1, help="learning rate of the probes")
    parser.add_argument("--seeds", metavar="N", type=int, default=3)
    parser.add_argument("--processes", metavar="N", type=int, default=2, help="--cpu-processes of each training")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="a setting of every training")
    given = parser.parse_args(arguments)
    folder, model = given.folder.resolve(), given.model
    words = list(sys.argv[1:] if arguments is None else arguments)
    words = [{str(given.folder): "FOLDER", model: "MODEL"}.get(word, word) for word in words]
    environment = describe_machine(shlex.join(["python", "-m", "benchmarks.probe", *words]))
    environment.pop("hostname", None)
    record: dict[str, Any] = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
    record |= {"environment": environment, "note": given.note}
    record |= {name: getattr(given, name) for name in ("image_size", "steps", "rate", "seeds", "processes")}
    with tempfile.TemporaryDirectory() as scratch:
        record["sides"] = measure(model, folder, given, Path(scratch), command)
    record["load_average_after"] = os.getloadavg()[0]
    publish(record, given.out, NAME, report)


if __name__ == "__main__":
    main()
