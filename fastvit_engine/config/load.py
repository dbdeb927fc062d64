"""Recipes and overrides, as a validated configuration."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fastvit_engine.config.sections import Config, DataSource
from fastvit_engine.errors import UserError

RECIPES = Path(__file__).parent.parent / "recipes"


@dataclass(frozen=True)
class Resolved:
    """A validated configuration and, for each dotted key, where its value came from."""

    config: Config
    origins: Mapping[str, str] = field(default_factory=dict)

    def to_yaml(self, *, with_origins: bool = False) -> str:
        text = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
        return _annotate(text, self.origins) if with_origins else text


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_config(recipe: str | None, overrides: Sequence[str] = ()) -> Resolved:
    """Reads a recipe (a name from `fastvit config list` or a path), applies `section.key=value` overrides, validates.

    Without a recipe, all values are defaults but for the overrides.

    Raises UserError naming the key, its origin and, for an unknown key, the nearest valid one.
    """
    values, origins = ({}, {}) if recipe is None else _read_recipe(_find_recipe(recipe))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise UserError(f"--set {override!r} is not of the form section.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"--set {override!r}: the value is not valid YAML") from error
        _assign(values, key.strip(), value)
        origins.update(dict.fromkeys([key.strip(), *_flatten({key.strip(): value})], "--set"))
        origins.setdefault(key.strip().partition(".")[0], "--set")
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, origins)) from None
    return Resolved(config, _complete_origins(config, origins))


def _find_recipe(recipe: str) -> Path:
    if recipe in recipe_names():
        return RECIPES / f"{recipe}.yaml"
    path = Path(recipe)
    if path.is_file():
        return path
    near = difflib.get_close_matches(recipe, recipe_names(), n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known recipes: {', '.join(recipe_names())}"
    raise UserError(f"no recipe or file named '{recipe}'; {hint}")


def _read_recipe(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        text = path.read_text()
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where} is not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(values, dict):
        raise UserError(
            f"{path} must hold sections such as 'model:' and 'train:', not a single {type(values).__name__}"
        )
    origins: dict[str, str] = {}

    def note_lines(node: yaml.Node | None, prefix: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key_node, value_node in node.value:
            name = f"{prefix}{key_node.value}"
            origins[name] = f"{path.name}:{key_node.start_mark.line + 1}"
            note_lines(value_node, f"{name}.")

    note_lines(root, "")
    return values, origins


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {dotted}: '{section}' holds a single value, not a section")
        values = inner
    values[last] = value


def _valid_keys(location: Sequence[str | int]) -> list[str]:
    model: type[BaseModel] = Config
    for part in location:
        if part == "sources":
            return list(DataSource.model_fields)
        model = model.model_fields[str(part)].annotation  # type: ignore[assignment]  # only sections are asked for
    return list(model.model_fields)


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
        valid = _valid_keys(problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean '{'.'.join([*path[:-1], near[0]])}'?" if near else f"valid: {', '.join(valid)}"
        return f"unknown configuration key '{key}'{where}; {hint}"
    given = problem["input"]
    if problem["type"] == "missing":
        return f"configuration key '{key}'{where} is {given!r}: too few values"
    message = problem["msg"].removeprefix("Value error, ")
    return f"configuration key '{key}'{where} is {given!r}: {message[0].lower()}{message[1:]}"


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
