"""Oxford-IIIT Pets: its two archives, or the folders that they unpack to."""

from typing import NamedTuple

from fastvit_engine.data.build.sources.context import Context
from fastvit_engine.data.build.sources.image_set import find_texts, open_images, take_splits
from fastvit_engine.data.build.sources.listing import Listing, ListingBuilder
from fastvit_engine.data.shards.remote_path import AnyPath
from fastvit_engine.errors import UserError
from fastvit_engine.shown import brief

IMAGES, ANNOTATIONS = "images.tar.gz", "annotations.tar.gz"
_LISTS = {"train": "trainval.txt", "test": "test.txt"}
_MOST_CLASSES = 10_000


class _Line(NamedTuple):
    """An image of a list: Abyssinian_100 1 1 1."""

    name: str
    number: int  # of the class, from 1


def holds_pets(path: AnyPath, names: list[str]) -> bool:
    """Whether a folder with these names in it holds the data set. Raises UserError if its lists cannot be read."""
    if not all(f"{folder}.tar.gz" in names or folder in names for folder in ("images", "annotations")):
        return False
    lines = find_texts(path, "annotations", ANNOTATIONS, [_LISTS["train"]])[_LISTS["train"]]
    if lines is None:  # another data set with archives or folders of these names
        return False
    return not lines or any(_parse(line) for line in lines[:10])


def list_pets(path: AnyPath, context: Context) -> Listing:
    """images/NAME.jpg for each line "NAME CLASS SPECIES BREED" of annotations/trainval.txt and, held out, test.txt.

    Class names are those of the files, in the order of the class numbers. --leave-out test leaves out a split. Raises
    UserError if a file is missing or damaged, or the lists contradict each other.
    """
    taken = take_splits(list(_LISTS), path, context)
    texts = find_texts(path, "annotations", ANNOTATIONS, list(_LISTS.values()))
    lists = {split: _read_list(texts[name], name, path) for split, name in _LISTS.items()}
    classes = _class_names([line for lines in lists.values() for line in lines], path)
    builder = ListingBuilder(named=True)
    builder.eval_only = "train" not in taken
    images = open_images(path, "images", IMAGES, builder, context)
    for split, lines in lists.items():
        builder.held_out = split == "test"
        for line in lines:
            if split in taken:
                images.add(f"{line.name}.jpg", classes[line.number - 1])
            else:
                images.leave_out(f"{line.name}.jpg", f"of the {split} split")
    images.finish()
    splits = {"train": "trainval.txt (train)", "test": "test.txt (eval)"}
    context.describe(f"Oxford-IIIT Pets, {' and '.join(splits[split] for split in taken)}")
    return builder.finish(context.classes or classes, str(path))


def _parse(line: str) -> _Line | None:
    fields = line.split()
    if len(fields) != 4 or not all(field.isdecimal() and field.isascii() for field in fields[1:]):
        return None
    return _Line(fields[0], int(fields[1][:9])) if 0 < int(fields[1][:9]) <= _MOST_CLASSES else None


def _read_list(lines: list[str] | None, name: str, path: AnyPath) -> list[_Line]:
    if not lines:
        raise UserError(f"{path} has no {name} or an empty one: download {ANNOTATIONS} again")
    parsed = [_parse(line) for line in lines]
    found = [line for line in parsed if line is not None]
    if len(found) < len(lines):
        raise UserError(
            f"{name} of {path} has the line '{brief(lines[parsed.index(None)])}', which is not NAME CLASS SPECIES "
            "BREED: download it again"
        )
    return found


def _class_names(lines: list[_Line], path: AnyPath) -> list[str]:
    """By class number; a number that no image has stands for itself."""
    names: dict[int, str] = {}
    numbers: dict[str, int] = {}
    for name, number in lines:
        breed = name.rpartition("_")[0] or name
        if names.setdefault(number, breed) != breed or numbers.setdefault(breed, number) != number:
            raise UserError(
                f"the lists of {path} give class {number} the names {brief(names[number])} and {brief(breed)}, or the "
                "latter two numbers: download them again"
            )
    return [names.get(number, str(number)) for number in range(1, max(names) + 1)]
