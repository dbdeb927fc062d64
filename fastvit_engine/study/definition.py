"""What a study is: a YAML file that names a recipe, settings of all runs, and what the runs differ in."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field, ValidationError

from fastvit_engine.config.near import near_names, or_list
from fastvit_engine.config.recipes import read_file
from fastvit_engine.config.sections.base import Section
from fastvit_engine.errors import UserError
from fastvit_engine.recipe_files import study_paths
from fastvit_engine.shown import brief

MOST_RUNS = 10_000
LABEL, RECIPE = "label", "recipe"  # keys of an entry of `runs` that are no settings
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_OF_THE_STUDY = ("seed", "name")  # settings that are not a run's own

_SCALARS = (str, int, float, bool, type(None))


class FigureOf(Section):
    """What the picture of a study shows: accuracy over `x`, with a line for each value of `lines`."""

    x: str = "exaflops"
    """A setting that the runs differ in; label; or exaflops."""

    lines: str | None = None
    """A setting that the runs differ in, or label; null: one line."""

    log: bool = False
    """A logarithmic axis; that of exaflops always is."""


def _named(name: str) -> str:
    if not re.fullmatch(_NAME, name):
        raise ValueError("use letters, digits, '.', '_' and '-', up to 64 of them")
    return name


class Study(Section):
    """A study file."""

    name: Annotated[str, AfterValidator(_named)]
    """Of its figure and table."""

    title: str = ""
    """For people, in one line."""

    recipe: str
    """What every run trains: a name from `fastvit config list`, or a file."""

    settings: dict[str, Any] = Field(default_factory=dict)
    """Of every run, by dotted keys, over the recipe's."""

    seeds: int = Field(1, gt=0, le=1000)
    """Repetitions of every run, with the seeds 0, 1, ..."""

    shots: int | None = Field(5, gt=0, le=1_000_000)
    """Images per class of the few-shot accuracy at the end of each run; null: none."""

    runs: tuple[dict[str, Any], ...] = Field(min_length=1, max_length=MOST_RUNS)
    """Settings that runs differ in. A list of values is a choice: an entry stands for every combination of its own."""

    figure: FigureOf = FigureOf()


class Variant(NamedTuple):
    """Runs of a study that differ in their seed only."""

    label: str | None
    recipe: str
    settings: dict[str, Any]  # by dotted keys
    shown: tuple[str, ...] = ()  # the keys that tell it from others: all, or those that its label does not say


def find_study(name: str) -> Path:
    """The file of a study: a name, or a path. Raises UserError that offers near names."""
    shipped = study_paths()
    if name in shipped:
        return shipped[name]
    try:
        path = Path(name).expanduser()
        if path.is_file():
            return path
    except (OSError, ValueError, RuntimeError):  # no file can have that name
        pass
    near = near_names(Path(name).stem, list(shipped), most=3, cutoff=0.6)
    hint = f"did you mean {or_list(near)}?" if near else f"there are {', '.join(shipped)}"
    raise UserError(f"no study or file named '{brief(name)}'; {hint}")


def read_study(path: Path) -> Study:
    """Raises UserError, naming file and line, for a file that is no study."""
    values, origins = read_file(path)
    try:
        study = Study.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).lstrip(".")
        if problem["type"] == "missing":
            raise UserError(f"study {path} has no '{key}': add it") from None
        where = origins.get(key, path.name)
        if problem["type"] == "extra_forbidden":
            keys = ", ".join(FigureOf.model_fields if key.startswith("figure.") else Study.model_fields)
            raise UserError(f"study {path} ({where}): there is no '{brief(key)}'; a study has {keys}") from None
        message = problem["msg"].removeprefix("Value error, ")
        given = brief(repr(problem["input"]))
        raise UserError(f"study {path} ({where}): {key} is {given}: {message[0].lower()}{message[1:]}") from None
    check_settings(study.settings, path)
    for entry in study.runs:
        check_settings({key: value for key, value in entry.items() if key not in (LABEL, RECIPE)}, path)
        for key in (LABEL, RECIPE):
            if not isinstance(entry.get(key, ""), str):
                raise UserError(f"study {path}: {key} of an entry of runs is {brief(repr(entry[key]))}: write one text")
    _check_figure(study, path)
    return study


def check_settings(settings: Mapping[str, Any], path: Path) -> None:
    """Raises UserError for settings that have no dotted key, or a value that no recipe could hold."""
    for key, value in settings.items():
        if key in _OF_THE_STUDY:
            raise UserError(
                f"study {path} sets {key} of its runs: leave it out, since a study repeats every run with the seeds "
                "0, 1, ... (seeds) and names them itself"
            )
        if isinstance(value, Mapping) and "." not in key:
            raise UserError(
                f"study {path} has a section '{brief(key)}': write dotted keys, such as {brief(key)}."
                f"{brief(next(iter(value), 'key'))}"
            )
        if not _is_plain(value):
            raise UserError(f"study {path}: {brief(key)} is {brief(repr(value))}, which no setting can be: correct it")


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    return isinstance(value, _SCALARS)


def _check_figure(study: Study, path: Path) -> None:
    own = {key for entry in study.runs for key in entry if key != RECIPE}
    for name, key, others in (("x", study.figure.x, {"exaflops"}), ("lines", study.figure.lines, {None})):
        if key not in own | others:
            raise UserError(
                f"study {path}: figure.{name} is '{key}', which its runs do not differ in; they differ in "
                f"{', '.join(sorted(own))}"
            )


def variants(study: Study, path: Path) -> list[Variant]:
    """What the runs of a study differ in, in order. Raises UserError for an empty choice, and if two are the same."""
    found: list[Variant] = []
    seen: set[str] = set()
    for entry in study.runs:
        for settings in _combinations({key: value for key, value in entry.items() if key not in (LABEL, RECIPE)}, path):
            variant = Variant(entry.get(LABEL), entry.get(RECIPE, study.recipe), settings)
            if repr(variant[1:3]) in seen:
                raise UserError(f"study {path} has two runs with {describe(settings)}: leave one of them out")
            seen.add(repr(variant[1:3]))
            found.append(variant)
            if len(found) * study.seeds > MOST_RUNS:
                raise UserError(f"study {path} has more than {MOST_RUNS:,} runs: shorten its lists")
    return [variant._replace(shown=_shown(variant, found)) for variant in found]


def _shown(variant: Variant, others: Sequence[Variant]) -> tuple[str, ...]:
    """The keys of a variant; of one with a label, those in which it differs from another with that label."""
    if variant.label is None:
        return tuple(variant.settings)
    same = [other.settings for other in others if other.label == variant.label]
    return tuple(key for key, value in variant.settings.items() if any(other.get(key) != value for other in same))


def _combinations(entry: Mapping[str, Any], path: Path) -> Iterator[dict[str, Any]]:
    choices = [value if isinstance(value, list) else [value] for value in entry.values()]
    for key, choice in zip(entry, choices, strict=True):
        if not choice:
            raise UserError(f"study {path}: {brief(key)} has an empty list of values: name some, or leave it out")
    for values in product(*choices):
        yield dict(zip(entry, values, strict=True))


def describe(settings: Mapping[str, Any]) -> str:
    """Settings as people read them: "pool=cls, learning_rate=0.001"."""
    return ", ".join(f"{short(key)}={value_text(value)}" for key, value in settings.items()) or "the recipe as it is"


def short(key: str) -> str:
    """The last part of a dotted key; with the part before it where the last one says nothing."""
    *before, last = key.split(".")
    return ".".join([*before[-1:], last]) if last in ("name", "kind", "every") else last


def value_text(value: Any) -> str:
    if isinstance(value, float):
        text = f"{value:g}"
        return text if set(text) & set(".en") else f"{text}.0"  # 1.0 is another data.subset than 1
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
