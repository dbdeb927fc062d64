"""ImageNet-1k (ILSVRC2012): its official files, and the folder that Kaggle packs."""

import csv
import dataclasses
import io
from pathlib import Path

import numpy as np

from fastvit_engine.data.build.sources.context import Context, is_image
from fastvit_engine.data.build.sources.devkit import DEVKIT, class_ids
from fastvit_engine.data.build.sources.folder import list_class_folders, list_folder
from fastvit_engine.data.build.sources.listing import Listing, ListingBuilder, join
from fastvit_engine.data.build.sources.tars import list_class_tars, list_flat_tar
from fastvit_engine.data.shards.remote_path import AnyPath
from fastvit_engine.errors import UserError

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
KAGGLE_LABELS = "LOC_val_solution.csv"
_KAGGLE = Path("Data", "CLS-LOC")


def list_imagenet(path: AnyPath, context: Context) -> Listing:
    """A folder with the official training tar and, for the eval split, validation tar and devkit (or --labels).

    Without the training tar, the validation tar is to be evaluated on, with the classes of the devkit (or --classes, or
    of labels that are indices).
    Or Kaggle's folder: ILSVRC/Data/CLS-LOC/train with a folder for each class, val with images whose labels are in
    LOC_val_solution.csv, and test with images without labels.
    """
    if context.labels is not None and not (path / VALIDATION).exists():
        raise UserError(f"--labels names the labels of {VALIDATION}, which is not in {path}: leave it out")
    kaggle = None if (path / TRAIN).exists() else kaggle_folder(path)
    if kaggle is not None:
        return _list_kaggle(kaggle, context)
    if not (path / TRAIN).exists():
        return _list_validation(path, context)
    train = list_class_tars(path / TRAIN, context)
    context.describe("ImageNet's tars")
    if not (path / VALIDATION).exists():
        return train
    _check_labels(path, context)
    context.classes = train.classes
    return join(train, list_flat_tar(path / VALIDATION, context))


def _check_labels(path: AnyPath, context: Context) -> None:
    if context.labels is None:
        if not (path / DEVKIT).exists():
            raise UserError(
                f"{path} has {VALIDATION} but not its labels: put {DEVKIT} there or name a file of labels with --labels"
            )
        context.labels = str(path / DEVKIT)


def _list_validation(path: AnyPath, context: Context) -> Listing:
    """The validation tar alone, all of it held out."""
    _check_labels(path, context)
    if context.classes is None and ((path / DEVKIT).exists() or not str(context.labels).endswith(".json")):
        if not (path / DEVKIT).exists():
            raise UserError(
                f"{path} has neither {TRAIN} nor {DEVKIT}, which say the classes: put one there, or list them with "
                "--classes"
            )
        context.classes = class_ids(path / DEVKIT)
    context.describe("ImageNet's validation tar")
    listing = list_flat_tar(path / VALIDATION, context)
    return dataclasses.replace(listing, held_out=np.ones(len(listing), np.bool_), eval_only=True)


def holds_imagenet(path: AnyPath, names: list[str]) -> bool:
    """Whether a folder with these names in it holds official tars of ImageNet-1k, or what Kaggle packs."""
    return TRAIN in names or VALIDATION in names or kaggle_folder(path) is not None


def kaggle_folder(path: AnyPath) -> AnyPath | None:
    """The folder in `path` that holds train/ and val/ as Kaggle packs them, None if there is none."""
    for folder in (path / "ILSVRC" / _KAGGLE, path / _KAGGLE, path / "CLS-LOC"):
        if (folder / "train").is_dir():
            return folder
    return path if (path / "train").is_dir() and _holds_validation_images(path / "val") else None


def _holds_validation_images(folder: AnyPath) -> bool:
    """Whether a folder has ImageNet's validation images in no folders of their classes."""
    try:
        return any(path.name.startswith("ILSVRC2012_val_") and path.is_file() for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return False


def _list_kaggle(folder: AnyPath, context: Context) -> Listing:
    if not _holds_validation_images(folder / "val"):
        return list_folder(folder, context)
    train = list_class_folders(folder / "train", context)
    context.descriptions[-1] = "ImageNet as Kaggle packs it"
    tests = _images_in(folder / "test")
    if tests:
        context.counts["image in test/ (no labels)"] += len(tests)
    images = _images_in(folder / "val")
    labels = next(
        (file for parent in (folder, *folder.parents[:4]) if (file := parent / KAGGLE_LABELS).is_file()), None
    )
    if labels is None:
        context.counts[f"image in val/ (no {KAGGLE_LABELS}, which has the labels)"] += len(images)
        return train
    known = _kaggle_labels(labels)
    builder = ListingBuilder()
    builder.held_out = True
    builder.add_file("path", folder / "val")
    for image in images:
        label = known.get(image.partition(".")[0])
        if label is None:
            raise UserError(f"{labels} has no label for {image} of {folder / 'val'}: download it again")
        builder.add(image, [label])
    return join(train, builder.finish(train.classes, str(labels)))


def _images_in(folder: AnyPath) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if is_image(path.name)) if folder.is_dir() else []


def _kaggle_labels(path: AnyPath) -> dict[str, str]:
    """Name of the image without its suffix -> WordNet id, which the boxes of its object follow."""
    try:
        with path.open("rb") as binary, io.TextIOWrapper(binary, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not {"ImageId", "PredictionString"} <= set(rows.fieldnames or ()):
                raise KeyError("it has no such columns")
            return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, IndexError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read as ImageId,PredictionString ({error or type(error).__name__}): download it again"
        ) from error
