"""From a recipe and `--set` to a validated configuration that remembers where each value came from."""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from fastvit_engine.config.checks import check_config
from fastvit_engine.config.deepspeed_section import as_numbers
from fastvit_engine.config.keys import MOVED, fields, hint, sections, takes_list, takes_null, takes_text
from fastvit_engine.config.recipes import find_recipe, parse_yaml, read_recipe
from fastvit_engine.config.sections import Config
from fastvit_engine.errors import UserError
from fastvit_engine.shown import recorded

_SET = "--set"
_OVERRIDES = "overrides"  # where a value comes from that a program gave as a mapping
_LONGEST_SHOWN = 2000  # characters of an error, or of a value in it
_MOST_PARTS = 32  # of a key, which DeepSpeed's own options make longer than ours are
_PAIRS = "write pairs of a size and a point of the run, as [[128, 50%], [160, 75%]]"
_ADVICE = {  # what to do, by key and by the kind of pydantic's error
    ("data.mean", "less_than_equal"): "pixels are in [0, 1]: divide a mean of 0 to 255 by 255",
    ("data.std", "less_than_equal"): "pixels are in [0, 1]: divide a deviation of 0 to 255 by 255",
    ("data.std", "greater_than"): "a pixel of 0 to 255 has steps of 0.004: give the deviation of pixels in [0, 1]",
    ("tokens.image_sizes", "tuple_type"): _PAIRS,
    ("tokens.image_sizes", "missing"): _PAIRS,
    ("data.train", "model_type"): "write entries as [{shards: a.tar, weight: 2}], and a glob in brackets as ./[ab].tar",
}
_SECRETS_LEFT_OUT = "# User names, passwords and queries of URLs are left out here: give them again with --set.\n"
_NULLS = ("", "~", "null", "Null", "NULL")  # how YAML writes null


class _OneLineDumper(yaml.SafeDumper):
    """Writes every text on one line, so that a comment can follow it."""


def _one_line(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)


_OneLineDumper.add_representer(str, _one_line)


@dataclass(frozen=True)
class Resolved:
    """A validated configuration and, for each dotted key, where its value came from."""

    config: Config
    origins: Mapping[str, str] = field(default_factory=dict)

    def to_yaml(self, *, with_origins: bool = False) -> str:
        """The configuration as YAML, without the secrets of URLs; a comment at its head says so if there were any."""
        values = self.config.model_dump(mode="json")
        public = recorded(values)
        text = yaml.dump(public, Dumper=_OneLineDumper, sort_keys=False, width=math.inf)
        head = "" if public == values else _SECRETS_LEFT_OUT
        return head + (_annotate(text, self.origins) if with_origins else text)

    if not TYPE_CHECKING:  # a type checker shall find attributes that do not exist

        def __getattr__(self, name: str) -> Any:
            """Says where the sections are; Python asks only for what a Resolved does not have."""
            if name in Config.model_fields:
                raise AttributeError(f"load_config returns a Resolved, which has sections in .config: .config.{name}")
            raise AttributeError(f"'Resolved' object has no attribute '{name}'")


def load_config(recipe: str | None, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Resolved:
    """Reads a recipe (a name from `fastvit config list` or a path), applies the overrides, and validates the result.

    overrides: a list of texts as `--set` takes them, ["train.duration=5 epochs"]; or a mapping from keys to values,
    {"train.duration": "5 epochs", "zero.stage": 2}. Without a recipe, all other values are defaults.

    Raises UserError naming the key, its origin and, for an unknown key, the one that was probably meant.
    """
    values, origins = ({}, {}) if recipe is None else read_recipe(find_recipe(recipe))
    origin = _OVERRIDES if isinstance(overrides, Mapping) else _SET
    for key, value in _pairs(overrides):
        if key.count(".") >= _MOST_PARTS:
            raise UserError(f"unknown configuration key '{_shortened(key)}' ({origin}): no key has so many parts")
        _check_encoding(key, value, origin)
        _assign(values, key, value, origin)
        origins.update(dict.fromkeys([key, *_flatten({key: value})], origin))
        origins.setdefault(key.partition(".")[0], origin)
    _check_moved(values, origins)
    if isinstance(values.get("deepspeed"), Mapping):
        values["deepspeed"] = as_numbers(values["deepspeed"])
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, origins)[:_LONGEST_SHOWN]) from None
    check_config(config)
    return Resolved(config, _complete_origins(config, origins))


def _pairs(overrides: Sequence[str] | Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keys and values of overrides in either form."""
    if isinstance(overrides, str):
        raise UserError(f"overrides is the text {overrides!r}: give a list of such texts, or a mapping")
    if isinstance(overrides, Mapping):
        for key, value in _flatten(overrides).items():
            is_empty = isinstance(value, Mapping) and not value
            if not (is_empty and key in sections()):  # an empty section sets nothing
                yield key, _with_paths_as_text(value)
        return
    for override in overrides:
        key, separator, text = override.partition("=")
        key = key.strip()
        if not separator or not key or not key.isprintable():
            given = _shortened(repr(override))
            raise UserError(f"--set {given} is not of the form KEY=VALUE: write --set train.duration='5 epochs'")
        yield key, _value(key, text)


def _shortened(quoted: str) -> str:
    """As much of a quoted key or value as a sentence may hold. Escapes count as they are shown."""
    return quoted if len(quoted) <= _LONGEST_SHOWN else f"{quoted[:_LONGEST_SHOWN]}..."


def _check_encoding(key: str, value: Any, origin: str) -> None:
    """Raises UserError for text from bytes that are not UTF-8: no configuration file could hold it."""
    try:
        str(value).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"configuration key '{_shortened(key)}' ({origin}) is {_shortened(ascii(str(value)))}, which is not UTF-8: "
            "rename the file or folder"
        ) from None


def _with_paths_as_text(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: _with_paths_as_text(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_with_paths_as_text(inner) for inner in value]
    return value


def _value(key: str, text: str) -> Any:
    """What `--set key=text` means: for a key that holds text the text as it is, for any other what YAML makes of it."""
    if takes_text(key):
        if takes_null(key) and text.strip() in _NULLS:
            return None
        if not takes_list(key):
            return text
        listed = _list_in(text)
        if listed is not None:
            return listed
        if not _STARTS_LIST_OF_MAPPINGS.match(text):  # one that is not valid YAML is a mistake, not a file name
            return text
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        given = f"{_shortened(key)}={_shortened(repr(text))}"
        raise UserError(f"--set {given}: the value is not valid YAML") from error


_STARTS_LIST_OF_MAPPINGS = re.compile(r"\s*\[\s*\{")


def _list_in(text: str) -> list[Any] | None:
    """The list that `text` is in YAML's brackets; None for other text, such as the glob "[ab]/x-[0-9].tar"."""
    if not text.lstrip().startswith("["):
        return None
    try:
        value = parse_yaml(text)
    except (yaml.YAMLError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _assign(values: dict[str, Any], dotted: str, value: Any, origin: str) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(
                f"{origin} {_shortened(dotted)}: '{_shortened(section)}' holds a single value, not a section"
            )
        values = inner
    values[last] = value


def _check_moved(values: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """UserError that gives the new name of every key which is set by a former one."""
    given = _flatten(values)
    moved = [f"{old} is now {new} ({origins[old]})" for old, new in MOVED.items() if old in given]
    if moved:
        raise UserError(f"renamed configuration key{'s' if len(moved) > 1 else ''}: {', '.join(moved)}")


def _explain(error: ValidationError, origins: Mapping[str, str]) -> str:
    """The first problem as one sentence: what is wrong, where it was written, and what would be right."""
    problem = error.errors()[0]
    path = [part for part in problem["loc"] if isinstance(part, str) and part not in ("pattern", "sources")]
    key = ".".join(path)
    named = key
    while named and named not in origins:
        named = named.rpartition(".")[0]
    where = f" ({origins[named]})" if named else ""
    if problem["type"] == "extra_forbidden":
        return f"unknown configuration key '{key}'{where}; {hint(key)}"
    given = problem["input"]
    advice = _ADVICE.get((key, problem["type"]))
    if problem["type"] == "missing" and key in fields() and isinstance(problem["loc"][-1], str):
        return f"configuration key '{key}'{where} is missing"
    if problem["type"] == "missing":
        return f"configuration key '{key}'{where} is {given!r}: {advice or 'too few values'}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "too_short":
        message = f"write at least {problem['ctx']['min_length']}"
    if problem["type"] == "tuple_type" and key in fields() and advice is None:
        usual = ", ".join(str(value) for value in fields()[key].default)
        message = f"write a list in brackets, such as [{usual}]"
    message = f"{message[0].lower()}{message[1:]}" + ("" if advice is None else f"; {advice}")
    return f"configuration key '{key}'{where} is {given!r}: {message}"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def _complete_origins(config: Config, origins: Mapping[str, str]) -> dict[str, str]:
    return {name: origins.get(name, "default") for name in _flatten(config.model_dump())}


def _annotate(text: str, origins: Mapping[str, str]) -> str:
    """Adds each value's origin as a comment at the end of its line of `text` (YAML in block style, indented by two)."""
    lines: list[str] = []
    stack: list[str] = []
    for line in text.splitlines():
        indent = (len(line) - len(line.lstrip())) // 2
        key = line.strip().partition(":")[0]
        stack = [*stack[:indent], key]
        origin = origins.get(".".join(stack))
        lines.append(f"{line:<48}  # {origin}" if origin and not line.lstrip().startswith("-") else line)
    return "\n".join(lines) + "\n"
