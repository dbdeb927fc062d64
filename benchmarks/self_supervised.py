"""What objectives without labels learn of CIFAR-10, on a CPU.

    python -m benchmarks.self_supervised FOLDER --out DIR [--objectives mae dino] [--cpu-processes 2]

FOLDER has `train-*.tar` and `test-*.tar`, gzipped or not. `fastvit train` trains a recipe for each objective. Measured
on the test images are the objective itself, if it has no teacher, and the 25-shot accuracy of the encoder, student and
teacher, against that of the same encoder untrained and of raw pixels; the shots are from the first training shard.
Objectives that DIR has records of, and that are not named, stay there. With --runs, a training that was interrupted
continues. With --choose, the last training shard is held out and takes
the place of the test images: settings are chosen there.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.publish import publish
from benchmarks.recipe_runs import Command, Runs, Shards, add_runs, environment_of, fastvit, folder_of_runs, parser_of
from fastvit_engine.checkpoint.export import find_checkpoint
from fastvit_engine.checkpoint.reader import CheckpointReader
from fastvit_engine.config import Config, MaeConfig, MaskedPatchConfig, Resolved, load_config
from fastvit_engine.config.model_shape import COLOURS
from fastvit_engine.data import Batch
from fastvit_engine.engine.protocol import ParameterSlice
from fastvit_engine.evaluate.features import Features, extract_features
from fastvit_engine.evaluate.fewshot import classes_of, few_shot_accuracy
from fastvit_engine.evaluate.one_pass import OnePass, config_for
from fastvit_engine.models import VisionTransformer, build_for_training
from fastvit_engine.objectives import masked_patch_targets
from fastvit_engine.objectives.masks import draw_corruption
from fastvit_engine.observe.progress import WorkProgress

RECIPES = {
    "mae": "mae_cifar10_cpu",
    "masked_patch": "masked_patch_cifar10_cpu",
    "dino": "dino_cifar10_cpu",
    "moco": "moco_cifar10_cpu",
}
TAUGHT = ("dino", "moco")  # by a teacher, which is the average of the weights; no loss on held-out images
NAME = "self_supervised"
SHOTS, SEEDS = 25, 3
SHOWN = {"few_shot": "", "few_shot_teacher": ", its teacher", "few_shot_untrained": ", untrained"}
_BATCH = 250

Extract = Callable[[Iterable[Batch]], Features]


@dataclass(frozen=True)
class Experiment:
    """The trainings of both recipes, which continue if they were interrupted."""

    shards: Shards
    runs: Runs
    environment: Mapping[str, Any]  # the machine and the command
    settings: tuple[str, ...] = ()  # of every training, over the recipes'

    def measure(self, objective: str) -> dict[str, Any]:
        """Trains the recipe of an objective, and measures what has come of it."""
        resolved, load = self.resolved(objective), os.getloadavg()[0]
        trained = self.runs.train(objective, RECIPES[objective], self._settings(objective))
        last, losses = trained.metrics.train[-1], trained.metrics.losses
        model = trained_model(trained.run, resolved.config)
        record = {
            "recipe": RECIPES[objective],
            "command": trained.command,
            "environment": self.environment,
            "cpu_processes": self.runs.cpu_processes,
            "load_average": [load, os.getloadavg()[0]],  # before and after
            "steps": last["step"],
            "images": last["samples"],
            "training_s": last["seconds"],
            "cpu_s": trained.cpu_s,
            "held_out_loss": {str(row["step"]): row["loss"] for row in losses if row["eval"] == "eval"},
            "few_shot": self.few_shot(model, resolved),
            "few_shot_untrained": self.few_shot(untrained_model(resolved.config), resolved),
            "made_of": resolved.config.model_dump(mode="json", exclude={"data": {"train", "eval"}}),
        }
        if objective in TAUGHT:
            teacher = trained_model(trained.run, resolved.config, kind="ema")
            record["few_shot_teacher"] = self.few_shot(teacher, resolved)
        settings = resolved.config.pretraining
        if isinstance(settings, MaeConfig):
            record["error_of_mean"] = 1 - 1 / (3 * model.shape.patch_size**2)  # the variance is the unbiased one
        if isinstance(settings, MaskedPatchConfig):
            record["colours"] = colour_accuracy(model, self.batches("held_out", model, resolved), settings)
        return record

    def few_shot(self, model: VisionTransformer, resolved: Resolved, of: Extract | None = None) -> dict[str, Any]:
        """The accuracy of linear classifiers on the model's features, or what `of` makes of images for this model."""
        of = of or partial(extract_features, model)
        train, evaluation = (of(self.batches(which, model, resolved)) for which in ("shots", "held_out"))
        arrays = (train.features, train.labels, evaluation.features, evaluation.labels)
        classes = classes_of(train.labels, evaluation.labels)
        accuracies = [few_shot_accuracy(*arrays, shots=SHOTS, num_classes=classes, seed=seed) for seed in range(SEEDS)]
        return {"mean": mean(accuracies), "std": pstdev(accuracies), "seeds": accuracies}

    def batches(self, which: str, model: VisionTransformer, resolved: Resolved) -> Iterator[Batch]:
        """A pass over some of the shards."""
        one = OnePass.over(self._listed(which), "eval", config_for(model, resolved), named=which)
        return one.batches(_BATCH, doing="features of", progress=WorkProgress())

    def resolved(self, objective: str) -> Resolved:
        return load_config(RECIPES[objective], self._settings(objective))

    def _settings(self, objective: str) -> list[str]:
        data = [f"data.train={self._listed('train')}"]
        if objective not in TAUGHT:
            data.append(f"data.eval={self._listed('held_out')}")
        return [*data, *self.settings]

    def _listed(self, which: str) -> str:
        """The pattern of some shards."""
        shards = {"train": self.shards.train, "held_out": self.shards.test, "shots": self.shards.train[:1]}
        return self.runs.listed(which, shards[which])


def trained_model(run: Path, config: Config, kind: str = "weight") -> VisionTransformer:
    """The model of a run's last checkpoint, with what its objective adds, which exports leave out.

    kind: "ema" for the average of the weights.
    """
    checkpoint = find_checkpoint(str(run))
    manifest = checkpoint.read_manifest()
    weights = {name: torch.empty(shape) for name, shape in manifest.parameters.items()}
    slices = [ParameterSlice(name, 0, tensor.view(-1)) for name, tensor in weights.items()]
    CheckpointReader(checkpoint, manifest).fill({kind: slices})
    model = build_for_training(config)
    assert isinstance(model, VisionTransformer)
    model.load_state_dict(dict(model.named_buffers()) | weights)
    return model.eval()


def untrained_model(config: Config) -> VisionTransformer:
    """The model as the run of a configuration begins with it."""
    torch.manual_seed(config.seed)
    model = build_for_training(config)
    assert isinstance(model, VisionTransformer)
    return model.eval()


def raw_pixels(batches: Iterable[Batch]) -> Features:
    """The bytes of the images in place of a model's features."""
    columns = zip(
        *((batch.images.flatten(1).numpy(), batch.labels.numpy(), batch.keys) for batch in batches), strict=True
    )
    pixels, labels, keys = (np.concatenate(column) for column in columns)
    return Features(pixels.astype(np.float32), labels, keys)


@torch.no_grad()
def colour_accuracy(
    model: VisionTransformer, batches: Iterable[Batch], settings: MaskedPatchConfig
) -> dict[str, float]:
    """How often a MaskedPatchPredictor names the colour of a patch whose embedding is the mask token.

    Patches of the first column are left out, as they have no left neighbour to compare with. Fractions of `patches`:
    `model`; `left`, by the colour of the left neighbour as it is; `most_frequent`, by one colour for all.
    """
    right, left, frequencies = 0, 0, torch.zeros(COLOURS, dtype=torch.int64)
    for batch in batches:
        named, colours, counted = _colours(model, batch, settings)
        right += int((named == colours)[counted].sum())
        left += int((colours.roll(1, dims=1) == colours)[counted].sum())
        frequencies += colours[counted].bincount(minlength=COLOURS)
    patches = int(frequencies.sum())
    counts = {"model": right, "left": left, "most_frequent": int(frequencies.max())}
    return {"patches": patches} | {name: count / patches for name, count in counts.items()}


def _colours(model: VisionTransformer, batch: Batch, settings: MaskedPatchConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The colours that a model names, int64 [B, N]; those of the patches; and which patches count, bool [B, N]."""
    shape = model.shape
    corruption = draw_corruption(batch.seeds, shape.patches, settings.ratio, torch.device("cpu"))
    likeliest = model(batch.images, *corruption).argmax(dim=2)  # [B, M]
    colours = masked_patch_targets(batch.images, shape.patch_size)
    named = torch.full_like(colours, -1).scatter(1, corruption.chosen, likeliest)
    column = torch.arange(shape.patches) % round(shape.patches**0.5)
    return named, colours, (corruption.kind == 1) & (column > 0) & (batch.weights > 0)[:, None]


def report(record: Mapping[str, Any]) -> str:
    """The figures in Markdown."""
    found = record["objectives"]
    lines = [
        "# Learning CIFAR-10 (JPEG copy) without labels",
        "",
        f"Measured on {record['images']}.",
        "",
        f"| features | {SHOTS}-shot accuracy |",
        "|---|---:|",
        *(
            f"| encoder of `{one['recipe']}`{state} | {_share(one[key])} |"
            for one in found.values()
            for key, state in SHOWN.items()
            if key in one
        ),
        f"| raw pixels | {_share(record['few_shot_pixels'])} |",
        "",
        f"Mean and standard deviation (of the population) over {SEEDS} choices of the shots, from one training shard.",
        "",
    ]
    for objective, one in found.items():
        cpu = "a resumed run" if one["cpu_s"] is None else f"{one['cpu_s'] / 60:.1f} CPU minutes"
        lines += [
            f"`{one['recipe']}`: {one['steps']:,} steps, {one['images']:,} images, "
            f"{one['training_s'] / 60:.1f} minutes of training, {cpu}. {_made_by(one)}",
            "",
            *([] if objective in TAUGHT else [_of_objective(objective, one), ""]),
        ]
    return "\n".join(lines)


def _made_by(one: Mapping[str, Any]) -> str:
    """The command, the day and the machine of an objective's record."""
    environment, processes = one["environment"], one["cpu_processes"]
    versions = environment["versions"]
    return (
        f"`{environment['command']}`, {environment['started']}: {environment['cpu']}, {environment['cpu_count']} cores"
        f"{f', {processes} processes' if processes else ''}; Python {versions['python']}, PyTorch {versions['torch']}."
    )


def _share(figures: Mapping[str, Any]) -> str:
    return f"{100 * figures['mean']:.1f} % ± {100 * figures['std']:.1f}"


def _of_objective(objective: str, one: Mapping[str, Any]) -> str:
    """What a record says of the objective itself."""
    step, loss = list(one["held_out_loss"].items())[-1]
    if objective == "mae":
        return (
            f"**Normalised error of hidden pixels: {loss:.3f}** after {int(step):,} steps; that of the mean of each "
            f"patch is {one['error_of_mean']:.2f}."
        )
    colours = one["colours"]
    return (
        f"**Colours of masked patches: {100 * colours['model']:.1f} % right** of {colours['patches']:,}; the colour of "
        f"the left neighbour is right for {100 * colours['left']:.1f} %, the most frequent colour for "
        f"{100 * colours['most_frequent']:.1f} %. Cross-entropy of all chosen patches: {loss:.3f} nats."
    )


def recorded_before(path: Path, images: str) -> dict[str, Any]:
    """The objectives that a file has records of, if they were measured on the same images."""
    if not path.exists():
        return {}
    record = json.loads(path.read_text())
    if record["images"] != images:
        raise SystemExit(f"{path} was measured on {record['images']}, not on {images}: name another folder with --out")
    found: dict[str, Any] = record["objectives"]
    return found


def main(arguments: Sequence[str] | None = None, command: Command = fastvit) -> None:
    parser = parser_of(__doc__, f"{NAME}.json and .md")
    parser.add_argument("--objectives", choices=RECIPES, nargs="+", default=list(RECIPES), help="default: all")
    parser.add_argument("--cpu-processes", metavar="N", type=int, help="of each training; default: one")
    parser.add_argument("--choose", action="store_true", help="hold out the last training shard, and measure there")
    add_runs(parser)
    given = parser.parse_args(arguments)
    shards = Shards.of(given.folder)
    environment = environment_of(f"benchmarks.{NAME}", arguments, given)
    environment.pop("load_average")  # each training has its own
    images = "held-out training images" if given.choose else "test images"
    record: dict[str, Any] = {"images": images, "objectives": recorded_before(given.out / f"{NAME}.json", images)}
    with folder_of_runs(given.runs) as folder:
        runs = Runs(folder, command, given.cpu_processes)
        shards = shards.held_out() if given.choose else shards
        experiment = Experiment(shards, runs, environment, tuple(given.set))
        record["objectives"] |= {objective: experiment.measure(objective) for objective in given.objectives}
        resolved = experiment.resolved(given.objectives[0])
        record["few_shot_pixels"] = experiment.few_shot(untrained_model(resolved.config), resolved, raw_pixels)
    publish(record, given.out, NAME, report)


if __name__ == "__main__":
    main()
