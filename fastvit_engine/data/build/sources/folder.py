"""A folder with one sub-folder of images per class."""

import os
from collections.abc import Iterator
from pathlib import Path

from fastvit_engine.data.build.sources.context import Context, is_image, split_of_names
from fastvit_engine.data.build.sources.listing import Listing, ListingBuilder, join
from fastvit_engine.data.shards.names import IMAGE_SUFFIXES
from fastvit_engine.errors import UserError


def list_folder(path: Path, context: Context) -> Listing:
    """Images below path/<class>/, or below path/train/<class>/ and path/val/<class>/; other files are left out.

    Classes and files in sorted order. Raises UserError if a class has no image.
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
    builder = ListingBuilder()
    builder.add_file("path", path)
    context.progress.start("listing", len(folders), "class folders")
    for done, name in enumerate(folders):
        before = len(builder)
        for image in sorted(_images_below(path / name)):
            builder.add(os.path.join(name, image), [name])
        if len(builder) == before:
            raise UserError(
                f"class folder {path / name} holds no image ({', '.join(IMAGE_SUFFIXES)}): fill it or remove it"
            )
        context.progress.update(done + 1)
    return builder.finish(context.classes or folders, str(path))


def _sub_folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))


def _images_below(folder: Path) -> Iterator[str]:
    """Paths relative to `folder`; hidden files and folders are left out."""
    stack = [""]
    while stack:
        below = stack.pop()
        for entry in os.scandir(folder / below):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                stack.append(os.path.join(below, entry.name))
            elif is_image(entry.name) and entry.is_file():
                yield os.path.join(below, entry.name)
