"""Oxford Flowers-102: its archive of images, and the files of labels and splits."""

from fastvit_engine.data.build.sources.context import Context
from fastvit_engine.data.build.sources.image_set import open_images, read_file, take_splits
from fastvit_engine.data.build.sources.listing import Listing, ListingBuilder
from fastvit_engine.data.build.sources.matlab import read_numbers
from fastvit_engine.data.shards.remote_path import AnyPath
from fastvit_engine.errors import UserError
from fastvit_engine.storage.source import one_line

IMAGES, LABELS, SPLITS = "102flowers.tgz", "imagelabels.mat", "setid.mat"
_VARIABLES = {"train": "trnid", "val": "valid", "test": "tstid"}
_MOST_CLASSES = 10_000


def holds_flowers(names: list[str]) -> bool:
    """Whether a folder with these names in it holds the data set, or a part of it."""
    return any(name in names for name in (IMAGES, LABELS, SPLITS))


def list_flowers(path: AnyPath, context: Context) -> Listing:
    """jpg/image_00001.jpg and so on, with the labels of imagelabels.mat and the splits of setid.mat.

    Trains on train and val together and evaluates on test, as the ViT paper does. With --leave-out test, val is held
    out; with --leave-out val, it is left out. The files have no class names, only numbers from 1; --classes gives names
    in the order of the numbers. Raises UserError if a file is missing or damaged, or they contradict each other.
    """
    taken = take_splits(list(_VARIABLES), path, context)
    labels = _numbers(path / LABELS, "labels")
    splits = {split: _numbers(path / SPLITS, variable) for split, variable in _VARIABLES.items()}
    _check(labels, splits, path)
    names = _class_names(max(labels), context.classes, path)
    builder = ListingBuilder(named=True)
    images = open_images(path, "jpg", IMAGES, builder, context)
    held_out = "test" if "test" in taken else "val" if "train" in taken else None
    builder.eval_only = taken == ["test"]
    for split, numbers in splits.items():
        builder.held_out = split == held_out
        for number in numbers:
            if split in taken:
                images.add(f"image_{number:05d}.jpg", names[labels[number - 1] - 1])
            else:
                images.leave_out(f"image_{number:05d}.jpg", f"of the {split} split")
    images.finish()
    train = " and ".join(split for split in taken if split != held_out)
    context.describe(f"Flowers-102, {f'{train} (train)' if train else 'none'} and {held_out or 'none'} (eval)")
    return builder.finish(names, str(path))


def _numbers(path: AnyPath, variable: str) -> list[int]:
    try:
        return read_numbers(read_file(path), variable)
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): download it again") from error


def _check(labels: list[int], splits: dict[str, list[int]], path: AnyPath) -> None:
    if not labels or not 0 < min(labels) <= max(labels) <= _MOST_CLASSES:
        raise UserError(f"{path / LABELS} has labels that are no class numbers from 1: download it again")
    for split, numbers in splits.items():
        wrong = next((number for number in numbers if not 0 < number <= len(labels)), None)
        if wrong is not None:
            raise UserError(
                f"{path / SPLITS} names the image {wrong} in {_VARIABLES[split]}, and {LABELS} has {len(labels):,} "
                "labels: download both again"
            )


def _class_names(count: int, given: list[str] | None, path: AnyPath) -> list[str]:
    """By class number, from 1."""
    if given is None:
        return [str(number) for number in range(1, count + 1)]
    if len(given) != count:
        raise UserError(f"{path} has {count} classes, but {len(given)} class names are given: list one for each")
    return given
