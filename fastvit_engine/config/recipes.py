"""Recipes: how they are found by name, and what one says together with the recipes that it is based on."""

import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml

from fastvit_engine.config.bounded_yaml import check_yaml, read_yaml, yaml_errors
from fastvit_engine.config.near import near_names, or_list
from fastvit_engine.errors import UserError
from fastvit_engine.recipe_files import recipe_paths

_BASE = "base"
_OF_A_MODEL = ("config.json", "manifest.json", "model.safetensors")  # in a folder
_INTEGER, _NUMBER = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_Base: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's where PyYAML was built with it


class _Loader(_Base):
    """YAML whose numbers are decimal: 0100 is 100 and 1:30 is text, where YAML 1.1 reads 64 and 90."""

    # A copy, so that PyYAML's own loaders stay as they are.
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INTEGER, _NUMBER)]
        for first, resolvers in _Base.yaml_implicit_resolvers.items()
    }

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        try:
            return int(self.construct_scalar(node).replace("_", ""))
        except ValueError as error:  # Python reads up to 4300 digits
            problem = "it holds a number of too many digits"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error

    def construct_number(self, node: yaml.ScalarNode) -> float:
        text = self.construct_scalar(node).replace("_", "").lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_implicit_resolver(_INTEGER, re.compile(r"[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _NUMBER,
    re.compile(
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+][0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)
_Loader.add_constructor(_INTEGER, _Loader.construct_integer)
_Loader.add_constructor(_NUMBER, _Loader.construct_number)


def parse_yaml(text: str) -> Any:
    """The value of a YAML document from outside, such as that of `--set`. Raises yaml.YAMLError."""
    check_yaml(text)
    with yaml_errors():
        return yaml.load(text, Loader=_Loader)


def find_recipe(recipe: str, *, folder: Path = Path(), named: str = "recipe or file named") -> Path:
    """The file of a recipe: a name from `fastvit config list`, or a path, relative to `folder`.

    Raises UserError that offers near names.
    """
    shipped = recipe_paths()
    if recipe in shipped:
        return shipped[recipe]
    path = folder / Path(recipe).expanduser()
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError):  # no file can have that name
        is_file = is_folder = False
    if is_file:
        _check_no_weights(path)
        return path
    if is_folder and any((path / name).is_file() for name in _OF_A_MODEL):
        raise UserError(f"{path} is a model, not a recipe: {_start_from(path)}")
    if is_folder:
        inside = path / "config.yaml"
        hint = (
            f"did you mean '{inside}'?" if inside.is_file() else f"`photos --set data.train={path}` reads shards there"
        )
        raise UserError(f"{path} is a folder, not a recipe: {hint}")
    near = near_names(Path(recipe).stem, list(shipped), most=3, cutoff=0.6)
    hint = f"did you mean {or_list(near)}?" if near else f"known recipes: {', '.join(shipped)}"
    raise UserError(f"no {named} '{recipe[:500]}'; {hint}")


def _check_no_weights(path: Path) -> None:
    """Raises UserError for a file of weights, by its name or by what npz and safetensors begin with."""
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise UserError(
            f"{path} is a file of weights, not a recipe, and a pickle, which is not read: save its tensors as "
            "safetensors, and `fastvit train RECIPE --init FILE.safetensors` starts from them"
        )
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError:  # whoever reads it says what is wrong
        return
    is_safetensors = b"\0" in head[:8] and head[8:] == b"{"
    if path.suffix in (".npz", ".safetensors") or head.startswith(b"PK\3\4") or is_safetensors:
        raise UserError(f"{path} is a file of weights, not a recipe: {_start_from(path)}")


def _start_from(path: Path) -> str:
    return f"write `fastvit train RECIPE --init {path}` to start a run from it, such as finetune_photos"


def read_recipe(path: Path, *, _derived: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a recipe over those of its base, and for each dotted key the file and line that sets it.

    Raises UserError for a file that is not a recipe, and for a base that does not exist or leads back to the recipe.
    """
    values, origins = read_file(path)
    if _BASE not in values:
        return values, origins
    base, where = values.pop(_BASE), origins.pop(_BASE)
    if not isinstance(base, str) or not base:
        raise UserError(f"{where}: base is {base!r}: it must be the name of a recipe, or a path relative to this file")
    base_path = find_recipe(base, folder=path.parent, named=f"base ({where}) named")
    chain = (*_derived, path.resolve())
    if base_path.resolve() in chain:
        raise UserError(f"{where}: base '{base}' leads back to {base_path.name}: remove one of the bases")
    base_values, base_origins = read_recipe(base_path, _derived=chain)
    merge(base_values, values)
    return base_values, base_origins | origins


def merge(values: dict[str, Any], over: dict[str, Any]) -> None:
    """Puts the values of `over` into `values`, section by section; anything but a section is replaced."""
    for key, value in over.items():
        inner = values.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            merge(inner, value)
        else:
            values[key] = value


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a YAML file of sections, and for each dotted key the file and line that sets it.

    Raises UserError if it is no such file.
    """
    text = ""
    try:
        text = read_yaml(path)
        check_yaml(text)
        loader = _Loader(text)
        root = loader.get_single_node()
        origins = dict(_lines(root, path.name))
        with yaml_errors():
            values = {} if root is None else loader.construct_document(root)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        lines = text.splitlines()
        if mark and mark.line < len(lines) and "\t" in lines[mark.line][: mark.column + 1]:
            problem = "it holds a tab, which YAML does not take as indentation; use spaces"
        raise UserError(f"{path}{where} is not valid YAML: {problem}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not text.strip():  # as a lost disk leaves it
        raise UserError(f"{path} is empty: restore it, or write `name: ` and a name into it for a recipe of defaults")
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise UserError(
            f"{path} must hold sections such as 'model:' and 'train:', not a single {type(values).__name__}"
        )
    return values, origins


def _lines(node: yaml.Node | None, file: str, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, "file:line") of each key. Raises UserError for one that is set twice: YAML would drop the first."""
    if isinstance(node, yaml.SequenceNode):
        for number, entry in enumerate(node.value):
            yield from _lines(entry, file, f"{prefix.removesuffix('.')}[{number}].")
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[Hashable, int] = {}
    for key_node, value_node in node.value:
        name, line = f"{prefix}{key_node.value}", key_node.start_mark.line + 1
        if name in first:
            raise UserError(f"{file}:{line} sets '{name}' again, after line {first[name]}: keep one of them")
        first[name] = line
        yield name, f"{file}:{line}"
        yield from _lines(value_node, file, f"{name}.")
