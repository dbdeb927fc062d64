"""The runs of a study: what each trains, how long, and everything about them that can be refused beforehand."""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from fastvit_engine.config import Config, load_config
from fastvit_engine.config.keys import takes_text
from fastvit_engine.config.phases import Phases
from fastvit_engine.config.recipes import find_recipe
from fastvit_engine.data import prepare_data
from fastvit_engine.data.shards.names import find_shards
from fastvit_engine.errors import UserError
from fastvit_engine.models.flops import RunFlops
from fastvit_engine.recipe_files import recipe_paths
from fastvit_engine.shown import recorded
from fastvit_engine.study.definition import Study, Variant, describe, variants
from fastvit_engine.train.compute import Compute
from fastvit_engine.train.schedule import Schedule

_LONGEST_NAME = 120  # of a run folder
_MOST_FEATURES = 2_000_000  # images whose features a process can hold


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study."""

    number: int  # within the study, from 0 on
    name: str  # of its folder
    variant: Variant
    seed: int
    recipe: str  # as `fastvit train` takes it
    overrides: tuple[str, ...]  # what --set takes
    config: Config
    steps: int
    phases: Phases

    @property
    def settings(self) -> dict[str, Any]:
        return {**self.variant.settings, "seed": self.seed}

    @property
    def title(self) -> str:
        """For people."""
        shown = {key: self.variant.settings[key] for key in self.variant.shown}
        parts = [self.variant.label, describe(shown) if shown else None]
        return f"{': '.join(part for part in parts if part) or self.recipe}, seed {self.seed}"

    @property
    def images(self) -> int:
        return self.steps * self.config.train.global_batch_size

    @cached_property
    def exaflops(self) -> float:
        """Of the whole run, 10^18 floating-point operations, as papers count them."""
        return self._flops.whole / 1e18

    @cached_property
    def computed_flops(self) -> int:
        return self._flops.computed

    @cached_property
    def _flops(self) -> RunFlops:
        return Compute(self.config).of_steps(self.phases, 0, self.steps)

    @cached_property
    def made_of(self) -> dict[str, Any]:
        """Every setting, without secrets of URLs."""
        settings: dict[str, Any] = recorded(self.config.model_dump(mode="json"))
        return settings


def plan_study(
    study: Study, path: Path, given: Sequence[str], *, seeds: int | None = None, world_size: int = 1
) -> list[PlannedRun]:
    """All runs, those of the first seed first. Nothing is written.

    given: settings of every run, as --set takes them; world_size: processes of each run.
    Raises UserError, naming the run, for what training would refuse, as far as that shows before it starts.
    """
    found = variants(study, path)
    _check_given(given, found, path)
    names = _names(found)
    runs: list[PlannedRun] = []
    epochs = _Epochs(world_size)
    for seed in range(seeds or study.seeds):
        for variant, name in zip(found, names, strict=True):
            recipe = variant.recipe
            if recipe not in recipe_paths():
                recipe = str(find_recipe(recipe, folder=path.parent).resolve())
            overrides = [as_set(key, value) for key, value in {**study.settings, **variant.settings}.items()]
            overrides += [*given, f"seed={seed}"]
            try:
                config = load_config(recipe, overrides).config
                overrides += _few_shot(config, study.shots)
                few_shot_given = config.evaluate.fewshot.train is not None
                config = load_config(recipe, overrides).config
                _check_measured(config, study)
                samples = epochs.samples(config)
                if study.shots is not None and not few_shot_given:
                    _check_few_shot(max(samples or 0, config.data.train_samples or 0))
                schedule = Schedule(config, samples)
            except UserError as error:
                raise UserError(_about_run(str(error), variant, path, given)) from None
            name_of_run, steps = f"{name}_seed-{seed}", schedule.total_steps
            given_to_train = tuple(overrides)
            runs.append(
                PlannedRun(
                    len(runs), name_of_run, variant, seed, recipe, given_to_train, config, steps, schedule.phases
                )
            )
    return runs


def as_set(key: str, value: Any) -> str:
    """KEY=VALUE as --set takes it, for a value of a YAML file."""
    if isinstance(value, str) and takes_text(key):
        return f"{key}={value}"
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return f"{key}={text.removesuffix('...' + chr(10)).strip()}"


def _about_run(message: str, variant: Variant, path: Path, given: Sequence[str]) -> str:
    """What is wrong with a run: where it is written, unless the command line says so."""
    if any(f"'{setting.partition('=')[0].strip()}'" in message for setting in given):
        return message
    about = f"run with {describe(variant.settings)}" if variant.settings else f"run of {variant.recipe}"
    return f"study {path.name}, {about}: {message.replace(' (--set)', '')}"


def _check_given(given: Iterable[str], found: Sequence[Variant], path: Path) -> None:
    for setting in given:
        key = setting.partition("=")[0].strip()
        if key == "seed":
            raise UserError("--set seed: a study repeats every run with the seeds 0, 1, ...: write --seeds N")
        if any(key == own or own.startswith(f"{key}.") for variant in found for own in variant.settings):
            raise UserError(
                f"--set {key}: the runs of study {path.name} differ in it; to choose other values, copy {path} and "
                "change the copy, or take some of its runs with --only"
            )


def _few_shot(config: Config, shots: int | None) -> list[str]:
    """Few-shot accuracy at the end: on the training and evaluation shards, unless others are set."""
    if shots is None:
        return []
    few_shot = config.evaluate.fewshot
    settings = [f"evaluate.fewshot.shots=[{shots}]"]
    if few_shot.train is None and few_shot.eval is None and config.data.eval is not None:
        if not isinstance(config.data.train, str | None):
            raise UserError(
                "data.train is a list of sources, and few-shot accuracy needs one: set evaluate.fewshot.train and "
                "evaluate.fewshot.eval, or shots: null in the study"
            )
        if config.data.train is not None:
            settings += [f"evaluate.fewshot.train={config.data.train}", f"evaluate.fewshot.eval={config.data.eval}"]
    return settings


def _check_few_shot(samples: int) -> None:
    """Raises UserError if the training images are too many to take the features of all."""
    if samples > _MOST_FEATURES:
        raise UserError(
            f"evaluate.fewshot.train is not set, and few-shot accuracy on data.train would look at {samples:,} images "
            "once more at the end of every run: set evaluate.fewshot.train and evaluate.fewshot.eval, or shots: null "
            "in the study"
        )


def _check_measured(config: Config, study: Study) -> None:
    """Raises UserError if a run could not be measured."""
    for key, value in (("data.train", config.data.sources), ("data.eval", config.data.eval)):
        if not value:
            raise UserError(f"{key} is not set, and a study trains and measures every run: add --set {key}=SHARDS")
    if config.pretraining is not None and study.shots is None:
        raise UserError(
            f"train.objective = {config.train.objective} has no top-1, and shots is null in the study: set shots to "
            "measure the features"
        )


class _Epochs:
    """How many samples an epoch has, looked up once for the same data."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._known: dict[str, int | None] = {}

    def samples(self, config: Config) -> int | None:
        """Raises UserError if there are no such shards, or they cannot be trained on."""
        about = json.dumps([config.data.model_dump(mode="json"), config.model.num_classes])
        if about not in self._known:
            self._known[about] = self._find(config)
        return self._known[about]

    def _find(self, config: Config) -> int | None:
        if config.data.epoch_samples is None:
            with tempfile.TemporaryDirectory(prefix="fastvit-study-") as folder:
                place = Path(folder)
                data = prepare_data(config, world_size=self.world_size, index_folder=place, scratch=place)
                return data.samples_per_epoch
        for source in config.data.sources:
            find_shards(source.shards, "train")
        find_shards(config.data.eval, "eval")
        return config.data.epoch_samples


def _names(found: Sequence[Variant]) -> list[str]:
    """A folder name for each variant, the same whatever others there are unless two would have the same."""
    names = [_name(variant) for variant in found]
    return [
        name if names.count(name) == 1 and len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}-{_digest(variant)}"
        for name, variant in zip(names, found, strict=True)
    ]


def _name(variant: Variant) -> str:
    settings = {key: value for key, value in variant.settings.items() if value is not None}
    parts = [variant.label or "", describe(settings) if settings else ""]
    if not any(parts):
        parts = [Path(variant.recipe).stem]
    text = "_".join(part for part in parts if part).replace("=", "-")
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("_.")


def _digest(variant: Variant) -> str:
    return hashlib.sha256(json.dumps(variant[:3], sort_keys=True).encode()).hexdigest()[:8]


def same_settings(written: Mapping[str, Any], run: PlannedRun) -> bool:
    """Whether a record was made of the settings of a run. One that is newer than the record had its default then."""
    try:
        settings = recorded(Config.model_validate(written).model_dump(mode="json"))
    except ValueError:
        return False
    return bool(settings == run.made_of)
