"""Lists of classes that people bring: the outputs of a model that count, and several right classes of each image."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastvit_engine.config.near import near_names
from fastvit_engine.errors import UserError
from fastvit_engine.evaluate.record import Right
from fastvit_engine.observe.units import counted
from fastvit_engine.text import read_text

Numbering = Literal["model", "list"]
_VAL = re.compile(r"ILSVRC2012_val_(\d{8})")


def read_real(path: Path, outputs: int) -> list[list[int]]:
    """The right classes of each image, from a JSON list of lists. Raises UserError for anything else."""
    lists = _read_json(path, "--real")
    if not isinstance(lists, list) or not all(isinstance(entry, list) for entry in lists):
        raise UserError(f"--real {path} is not a JSON list of lists: give the right classes of each image as a list")
    for number, entry in enumerate(lists):
        for value in entry:
            if type(value) is not int or not 0 <= value < outputs:
                raise UserError(
                    f"--real {path} has {value!r} for image {number}, which is none of the model's outputs "
                    f"0..{outputs - 1}: give the lists of the classes that the model was trained on"
                )
    return lists


def match_images(lists: int, keys: Sequence[str], positions: NDArray[np.int64], total: int | None) -> NDArray[np.int64]:
    """Which list belongs to each image: [N].

    Images of ImageNet's validation set are matched by the number in their keys; all others by their position among the
    samples, whose number is `total` (None: only the first samples were read). Raises UserError if lists and images
    cannot belong together.
    """
    named = [_VAL.search(key) for key in keys]
    if all(named):
        numbers = np.array([int(match[1]) - 1 for match in named if match])
        if numbers.min() < 0 or numbers.max() >= lists:
            raise UserError(
                f"--real has {counted(lists, 'list')} and the images have numbers up to {numbers.max() + 1:,}: give "
                "the lists of the whole validation set"
            )
        return numbers
    if (total is not None and lists != total) or lists <= positions.max():
        images = f"{total if total is not None else int(positions.max()) + 1:,}"
        raise UserError(
            f"--real has {counted(lists, 'list')} and --data {images} images: give one list per image, in their order"
        )
    return positions


def read_classes(text: str, names: Sequence[str] | None, outputs: int) -> list[list[int]]:
    """The outputs of each entry of --classes.

    text: numbers or names of classes, separated by commas; or a file: one per line, or a JSON list, whose entries may
    be lists of several. Raises UserError for what is no class of the model.
    """
    path = Path(text).expanduser()
    entries: list[Any]
    if path.is_file():
        entries = _entries(path)
    else:
        entries = [part.strip() for part in text.split(",") if part.strip()]
        if len(entries) == 1 and not entries[0].isdigit() and entries[0] not in (names or ()):
            if path.is_dir():
                raise UserError(f"--classes {text} is a folder: give a file, or classes separated by commas")
            if path.suffix:
                raise UserError(f"--classes {text} does not exist: name a file, or classes separated by commas")
    groups = [[_output(value, names, outputs) for value in _as_list(entry)] for entry in entries]
    if not groups or not all(groups):
        raise UserError(
            f"--classes '{text}' has {'an empty entry' if groups else 'no class'}: name the outputs that count"
        )
    every = [output for group in groups for output in group]
    if len(set(every)) < len(every):
        twice = next(output for number, output in enumerate(every) if output in every[:number])
        raise UserError(f"--classes names output {twice} twice: name each once")
    return groups


def right_outputs(
    groups: list[list[int]], outputs: int, data_classes: int | None, numbering: Numbering | None
) -> tuple[Right, str]:
    """What --classes means for the labels of the data, and a clause that says it.

    data_classes: of the data, if known. numbering: what the labels count, if somebody says so. Raises UserError if the
    labels can be read two ways.
    """
    grouped = any(len(group) > 1 for group in groups)
    if numbering is None and data_classes in (outputs, len(groups)) and (outputs != len(groups) or not grouped):
        numbering = "list" if data_classes == len(groups) else "model"
    if numbering is None:
        known = "nobody says how many classes the data has" if data_classes is None else f"the data has {data_classes}"
        raise UserError(
            f"--classes has {counted(len(groups), 'entry', 'entries')}, the model {outputs:,} outputs, and {known}: "
            "say with --labels list that label n is the n-th entry, or with --labels model that it is output n"
        )
    if numbering == "list":
        return Right.numbered(groups), f"label n is entry n of {len(groups):,}"
    if grouped:
        raise UserError("--classes has entries of several outputs, which only --labels list can serve: add it")
    return Right.among([group[0] for group in groups], outputs), f"{len(groups):,} of {outputs:,} outputs count"


_ADVICE = (
    "name the model's outputs for the data's classes with --classes, or add --ignore-names if only the spelling differs"
)


def check_names(model: Sequence[str] | None, data: Sequence[str] | None, advice: str = _ADVICE) -> None:
    """Raises UserError, with `advice`, if model and data both name their classes, and not alike."""
    if model is None or data is None or list(model) == list(data):
        return
    differing = next((n for n, pair in enumerate(zip(model, data, strict=False)) if pair[0] != pair[1]), None)
    if differing is None:
        if len(data) < len(model):
            return  # the data lacks the last classes
        raise UserError(f"the model has {len(model):,} classes and the data {len(data):,}: {advice}")
    raise UserError(
        f"class {differing} is '{model[differing]}' in the model and '{data[differing]}' in the data: {advice}"
    )


def _entries(path: Path) -> list[Any]:
    if path.suffix == ".json":
        found = _read_json(path, "--classes")
        if not isinstance(found, list):
            raise UserError(f"--classes {path} is not a JSON list: give the outputs that count as a list")
        return found
    try:
        return [line.strip() for line in read_text(path).splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {path} cannot be read ({error}): give a text file") from error


def _as_list(entry: Any) -> list[Any]:
    return entry if isinstance(entry, list) else [entry]


def _output(value: Any, names: Sequence[str] | None, outputs: int) -> int:
    """The output that a number, a number as text, or a name means; a name goes before a number."""
    if isinstance(value, str) and names is not None and value in names:
        if list(names).count(value) > 1:
            raise UserError(
                f"--classes has '{value}', which {list(names).count(value)} classes are called: give numbers"
            )
        return list(names).index(value)
    number = value if type(value) is int else int(value) if isinstance(value, str) and value.isdecimal() else None
    if number is not None and 0 <= number < outputs:
        return int(number)
    if number is not None:
        raise UserError(f"--classes has {number}, outside of the model's outputs 0..{outputs - 1}: correct it")
    near = near_names(str(value), list(names)) if names is not None else []
    hint = "the model's file names none, so give numbers" if names is None else "give one of its names, or a number"
    raise UserError(
        f"--classes has {value!r}, which is no class of the model: {f'did you mean {near[0]!r}?' if near else hint}"
    )


def _read_json(path: Path, option: str) -> Any:
    try:
        return json.loads(read_text(path))
    except OSError as error:
        raise UserError(f"{option} {path} cannot be read ({error.strerror}): correct it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{option} {path} is not valid JSON: it must be a list") from error
