"""A folder with one sub-folder of images per class."""

import os
from pathlib import Path

from fastvit_engine.data.build.sources.context import Context, split_of_names, why_left_out
from fastvit_engine.data.build.sources.listing import Listing, ListingBuilder, join
from fastvit_engine.errors import UserError

DANGLING = "is a dangling symbolic link"


def list_folder(path: Path, context: Context) -> Listing:
    """Images below path/<class>/, or below path/train/<class>/ and path/val/<class>/.

    Files are in sorted order, classes too, or by number if all are numbers. Other files are left out and counted.
    Raises UserError if a class has no image.
    """
    try:
        folders = _sub_folders(path)
        train, held_out, left_out = split_of_names(folders)
        if held_out and len(train) == 1 and len(held_out) == 1 and not left_out and _sub_folders(path / train[0]):
            listing = _list_classes(path / train[0], context)
            context.classes = listing.classes
            return join(listing, _list_classes(path / held_out[0], context))
        return _list_classes(path, context)
    except OSError as error:
        raise UserError(f"folder {error.filename} cannot be read ({error.strerror}): make it readable") from error


def _list_classes(path: Path, context: Context) -> Listing:
    folders = _sub_folders(path)
    if not folders:
        raise UserError(f"folder {path} has no sub-folders: put the images of each class into a folder of its own")
    builder = ListingBuilder(named=True)
    builder.add_file("path", path)
    context.progress.start("listing", len(folders), "class folders")
    for entry in _sorted_entries(path):
        if _is_dangling(entry):
            builder.add_faulty(entry.name, DANGLING)
        elif not entry.is_dir() or entry.name.startswith("."):
            builder.left_out[_kind(entry) or "image beside the class folders"] += 1
    for done, name in enumerate(folders):
        before = len(builder)
        _list_class(path, name, builder)
        if len(builder) == before:
            raise UserError(
                f"class folder {path / name} holds no image (.jpg, .png and others that Pillow reads): "
                "fill it or remove it"
            )
        context.progress.update(done + 1)
    return builder.finish(context.classes, str(path))


def _list_class(root: Path, name: str, builder: ListingBuilder) -> None:
    """Adds the images of a class folder and of the folders in it; hidden ones are left out."""
    images: list[str] = []
    dangling: set[str] = set()
    stack = [name]
    while stack:
        folder = stack.pop()
        for entry in os.scandir(root / folder):
            below = os.path.join(folder, entry.name)
            if _is_dangling(entry):
                dangling.add(below)
                images.append(below)
            elif (kind := _kind(entry)) is not None:
                builder.left_out[kind] += 1
            elif entry.is_dir():
                stack.append(below)
            else:
                images.append(below)
    for image in sorted(images):
        if image in dangling:
            builder.add_faulty(image, DANGLING)
        else:
            builder.add(image, [name])


def _kind(entry: "os.DirEntry[str]") -> str | None:
    """Why an entry of a class folder is left out; None for a folder or an image."""
    if entry.is_dir():
        return "hidden folder" if entry.name.startswith(".") else None
    if entry.is_file():
        return why_left_out(entry.name)
    return "special file"  # a pipe, socket or device


def _is_dangling(entry: "os.DirEntry[str]") -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _sorted_entries(folder: Path) -> list["os.DirEntry[str]"]:
    return sorted(os.scandir(folder), key=lambda entry: entry.name)


def _sub_folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
