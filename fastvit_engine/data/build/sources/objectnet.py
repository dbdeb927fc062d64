"""ObjectNet, an evaluation set, with the ImageNet-1k classes that its own mapping gives its images."""

import json
from collections import Counter
from typing import Any

from fastvit_engine.data.build.sources.context import Context
from fastvit_engine.data.build.sources.folder import DANGLING, read_tree
from fastvit_engine.data.build.sources.image_set import read_file
from fastvit_engine.data.build.sources.label_column import Label
from fastvit_engine.data.build.sources.layout import images_of
from fastvit_engine.data.build.sources.listing import Listing, ListingBuilder
from fastvit_engine.data.shards.remote_path import AnyPath
from fastvit_engine.errors import UserError

_LABELS = "folder_to_objectnet_label.json"  # folder -> ObjectNet's class
_MATCHES = "objectnet_to_imagenet_1k.json"  # ObjectNet's class -> names of ImageNet classes, separated by "; "
_NAMES = "imagenet_to_label_2012_v2"  # on each line the name of a class
_LINES = "pytorch_to_imagenet_2012_id.json"  # index of an ImageNet class, as text -> its line above, from 0
_BORDER = 1  # pixels, red, around each image
_WITHOUT = "of a class that ImageNet lacks"


def holds_objectnet(path: AnyPath, names: list[str]) -> bool:
    """Whether a folder with these names in it holds the data set."""
    return "images" in names and any((path / "mappings" / name).is_file() for name in (_LABELS, _MATCHES))


def list_objectnet(path: AnyPath, context: Context) -> Listing:
    """images/FOLDER/*.png, all held out, with the indices of all ImageNet-1k classes that match the folder's class.

    Classes that ImageNet lacks are left out. The red border of the images is cut off. Class names are ImageNet's, or
    those of --classes. Raises UserError if a file of mappings/ is missing or damaged, or they contradict each other.
    """
    names, matches = _read_mappings(path / "mappings", context.classes)
    if not (path / "images").is_dir():
        raise UserError(f"{path} has no folder images: unpack the archive again")
    tree = read_tree(path / "images", context)
    inside = tree.folders_in()
    builder = ListingBuilder(named=True)
    builder.multi_label = builder.held_out = builder.eval_only = True
    builder.left_out.update(tree.left_out)
    builder.left_out["image beside the class folders"] = len(tree.images[""])
    builder.add_file("path", path / "images", border=_BORDER)
    for folder in inside[""]:
        images = images_of(tree, inside, folder)
        if folder not in matches:
            builder.left_out["image of a folder that the mapping does not name"] += len(images)
            continue
        if not matches[folder]:
            builder.left_out[f"image {_WITHOUT}"] += len(images)
            builder.left_out[f"folder {_WITHOUT}"] += 1
            continue
        labels = [Label(names[index], named=True) for index in matches[folder]]
        for name, dangling in images:
            if dangling:
                builder.add_faulty(f"{folder}/{name}", DANGLING, file=0)
            else:
                builder.add(f"{folder}/{name}", labels, file=0)
    builder.left_out = +builder.left_out
    context.left_out += [f"the folder {folder}" for folder in sorted(tree.folders_left_out)]
    context.describe(_description(matches, tree.below(), context))
    return builder.finish(names, str(path))


def _description(matches: dict[str, list[int]], images: dict[str, int], context: Context) -> str:
    matched = [folder for folder, indices in matches.items() if indices]
    empty = sorted(folder for folder in matched if not images.get(folder))
    if empty:
        more = f" and {len(empty) - 3} others" if len(empty) > 3 else ""
        context.left_out.append(f"no image of {', '.join(empty[:3])}{more}")
    most = max((len(matches[folder]) for folder in matched), default=0)
    return (
        f"ObjectNet, {len(matched) - len(empty):,} of its {len(matches):,} classes, which match 1 to {most} of "
        f"ImageNet-1k each, without its border of {_BORDER} pixel"
    )


def _read_mappings(folder: AnyPath, given: list[str] | None) -> tuple[list[str], dict[str, list[int]]]:
    """The names of ImageNet's classes, and the indices of those that match, none or several, by folder of images."""
    try:
        lines = [line.strip() for line in read_file(folder / _NAMES).decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"{folder / _NAMES} is not text ({error}): unpack the archive again") from error
    places = _read_json(folder / _LINES)
    name_of = {index: _line(lines, places.get(str(index)), folder) for index in range(len(places))}
    by_name: dict[str, list[int]] = {}
    for index, name in name_of.items():
        by_name.setdefault(name, []).append(index)
    matches = {label: _indices(text, by_name, folder) for label, text in _read_json(folder / _MATCHES).items()}
    labels = {name: str(label) for name, label in _read_json(folder / _LABELS).items()}
    missing = next((label for label in matches if label not in labels.values()), None)
    if missing is not None:
        raise UserError(
            f"{folder / _LABELS} has no folder for '{missing[:200]}' of {_MATCHES}: unpack the archive again"
        )
    if given is not None and len(given) != len(name_of):
        raise UserError(
            f"ObjectNet's labels are those of ImageNet-1k, but {len(given):,} class names are given: list the "
            f"{len(name_of):,} of ImageNet-1k in their usual order, or leave them out"
        )
    counts = Counter(name_of.values())
    names = [name if counts[name] == 1 else f"{name} ({index})" for index, name in name_of.items()]  # crane, crane
    return given or names, {name: matches.get(label, []) for name, label in labels.items()}


def _read_json(path: AnyPath) -> dict[str, Any]:
    try:
        content = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): unpack the archive again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object: unpack the archive again")
    return content


def _line(lines: list[str], place: Any, folder: AnyPath) -> str:
    if type(place) is not int or not 0 <= place < len(lines) or not lines[place]:
        raise UserError(f"{folder / _LINES} does not give each class a line of {_NAMES}: unpack the archive again")
    return lines[place]


def _indices(text: Any, by_name: dict[str, list[int]], folder: AnyPath) -> list[int]:
    names = text.split("; ") if isinstance(text, str) else [str(text)]
    wrong = next((name for name in names if len(by_name.get(name.strip(), ())) != 1), None)
    if wrong is not None:
        raise UserError(
            f"{folder / _MATCHES} names the class '{wrong[:200]}', which is not the name of one class in {_NAMES}: "
            "unpack the archive again"
        )
    return [by_name[name.strip()][0] for name in names]
