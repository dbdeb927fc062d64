"""A folder with one sub-folder of images per class, or with such a folder for each split."""

import os
from fnmatch import fnmatchcase
from pathlib import Path

from fastvit_engine.data.build.sources.context import Context, why_left_out
from fastvit_engine.data.build.sources.layout import NOT_CLASSES, Layout, Reading, Tree, arrange, images_of
from fastvit_engine.data.build.sources.listing import Listing, ListingBuilder
from fastvit_engine.data.shards.remote_path import AnyPath, RemotePath
from fastvit_engine.errors import UserError

DANGLING = "is a dangling symbolic link"


def list_folder(path: AnyPath, context: Context) -> Listing:
    """Images below path/<class>/, or below path/train/<class>/ and path/val/<class>/ (or test).

    Files are in sorted order, classes too, or by number if all are numbers. Other files are left out and counted. A
    link that leads nowhere is a faulty image. Raises UserError if a class has no image, and, with both commands, if
    the folders can be read in two ways.
    """
    return _list(path, context, "folder")


def list_class_folders(path: AnyPath, context: Context) -> Listing:
    """Every sub-folder as a class, whatever its name is."""
    return _list(path, context, "class-folders")


def list_split_folders(path: AnyPath, context: Context) -> Listing:
    """Every sub-folder whose name has the word train, val or test as a split of class folders; others are left out."""
    return _list(path, context, "split-folders")


def _list(path: AnyPath, context: Context, reading: Reading) -> Listing:
    tree = read_tree(path, context)
    layout = arrange(tree, reading, str(path), context.command)
    listing = _list_classes(path, tree, layout, context)
    context.describe("a folder of classes" if not layout.splits else f"a folder of splits, {layout.splits}")
    context.left_out += layout.left_out
    return listing


def _list_classes(path: AnyPath, tree: Tree, layout: Layout, context: Context) -> Listing:
    builder = ListingBuilder(named=True)
    builder.left_out.update(layout.counts)
    inside = tree.folders_in()
    base: tuple[str, bool] | None = None
    numbers: dict[str, int] = {}
    for entry in layout.classes:
        if base != (entry.base, entry.held_out):
            base = (entry.base, entry.held_out)
            builder.held_out = entry.held_out
            if entry.base not in numbers:
                numbers[entry.base] = len(builder.files)
                builder.add_file("path", path / entry.base if entry.base else path)
                for name in sorted(tree.dangling.get(entry.base, ())):
                    builder.add_faulty(name, DANGLING)
        for name, dangling in images_of(tree, inside, entry.path):
            if dangling:
                builder.add_faulty(f"{entry.name}/{name}", DANGLING, file=numbers[entry.base])
            else:
                builder.add(f"{entry.name}/{name}", [entry.name], file=numbers[entry.base])
    return builder.finish(context.classes, str(path))


def read_tree(path: AnyPath, context: Context) -> Tree:
    """The folders below `path` with their images; hidden ones, and those that no class has, are left out.

    Raises UserError if a folder cannot be read, or if a pattern of --leave-out matches nothing.
    """
    context.heeded_leave_out = True
    tree = Tree()
    used: set[str] = set()
    try:
        if isinstance(path, Path):
            _read_local(path, tree, context, used)
        else:
            _read_remote(path, tree, context.leave_out, used)
    except OSError as error:
        raise UserError(f"folder {error.filename} cannot be read ({error.strerror}): make it readable") from error
    unused = next((pattern for pattern in context.leave_out if pattern not in used), None)
    if unused is not None:
        raise UserError(f"--leave-out is {unused!r}, which is nothing in {path}: correct it")
    return tree


def _read_local(path: Path, tree: Tree, context: Context, used: set[str]) -> None:
    level: list[tuple[str, frozenset[str]]] = [("", frozenset())]  # folders, and the links' targets on the way there
    while level:
        context.progress.start("listing", len(level), "folders")
        deeper: list[tuple[str, frozenset[str]]] = []
        for done, (below, targets) in enumerate(level):
            deeper += _read_folder(path, below, targets, tree, context.leave_out, used)
            context.progress.update(done + 1)
        level = deeper


def _read_folder(
    path: Path, below: str, targets: frozenset[str], tree: Tree, leave_out: list[str], used: set[str]
) -> list[tuple[str, frozenset[str]]]:
    """Adds what is in one folder to the tree; returns the folders in it."""
    names = tree.images.setdefault(below, [])
    folders: list[tuple[str, frozenset[str]]] = []
    for entry in os.scandir(path / below):
        inner = f"{below}/{entry.name}" if below else entry.name
        matches = {pattern for pattern in leave_out if fnmatchcase(inner, pattern)}
        used |= matches
        if matches or (entry.name in NOT_CLASSES and entry.is_dir()):
            tree.leave_out(inner, is_folder=entry.is_dir())
        elif entry.is_symlink() and not os.path.exists(entry.path):
            tree.dangling.setdefault(below, []).append(entry.name)
        elif entry.is_dir() and entry.name.startswith("."):
            tree.left_out["hidden folder"] += 1
        elif entry.is_dir():
            target = os.path.realpath(entry.path) if entry.is_symlink() else None
            if target is None:
                folders.append((inner, targets))
            elif target in targets or f"{os.path.realpath(path / below)}/".startswith(f"{target}/"):
                tree.left_out["link to a folder around it"] += 1
            else:
                folders.append((inner, targets | {target}))
        elif not entry.is_file():
            tree.left_out["special file"] += 1  # a pipe, socket or device
        elif (kind := why_left_out(entry.name)) is None:
            names.append(entry.name)
        else:
            tree.left_out[kind] += 1
    return folders


def _read_remote(path: RemotePath, tree: Tree, leave_out: list[str], used: set[str]) -> None:
    """Adds everything below a folder of an object store to the tree, by the rules of `_read_folder`."""
    passed_over: set[str] = set()
    for below, folders, names in path.files_below():
        if below in passed_over:
            passed_over |= {f"{below}/{name}" for name in folders}
            continue
        images = tree.images.setdefault(below, [])
        for name in folders + names:
            inner = f"{below}/{name}" if below else name
            matches = {pattern for pattern in leave_out if fnmatchcase(inner, pattern)}
            used |= matches
            is_folder = name in folders
            if matches or (name in NOT_CLASSES and is_folder):
                tree.leave_out(inner, is_folder=is_folder)
            elif is_folder and name.startswith("."):
                tree.left_out["hidden folder"] += 1
            elif is_folder:
                continue
            elif (kind := why_left_out(name)) is None:
                images.append(name)
                continue
            else:
                tree.left_out[kind] += 1
                continue
            if is_folder:
                passed_over.add(inner)
