"""Where every image of a source is and how it is labelled, as a few arrays."""

import hashlib
import json
import os
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from fastvit_engine.data.build.sources.label_column import MISSING, Label, Order, read_label, resolve
from fastvit_engine.data.shards.remote_path import AnyPath
from fastvit_engine.errors import UserError
from fastvit_engine.shown import brief

Kind = Literal["path", "url", "bytes", "sample", "pixels"]


class SourceFile(NamedTuple):
    """What the offset and size of an image refer to.

    path: a folder that the image's name is relative to. url: the name is the URL. Both have no offset and size.
    bytes: a file that holds the encoded image. sample: a tar that holds the members of the image's WebDataset sample.
    pixels: a file that holds raw pixels, uint8 `shape` = [H, W] or [H, W, C].
    """

    kind: Kind
    path: str
    shape: tuple[int, ...] = ()
    shown: str = ""  # what people know the file by, if not by its path
    fault: str = ""  # why none of its images can be used, such as "has no label"
    border: int = 0  # pixels on each side of its images that belong to none of them


@dataclass(frozen=True)
class Listing:
    """All images of a source in a fixed order: 40 bytes and the name for each, 8 more if there are several labels.

    The arrays may be memory-mapped.
    """

    classes: list[str]
    files: list[SourceFile]
    file: np.ndarray  # int32 [N], index into files
    offset: np.ndarray  # int64 [N]
    size: np.ndarray  # int64 [N]
    labels: np.ndarray  # int32 [sum of labels], index into classes
    label_start: np.ndarray  # int64 [N + 1]
    names: np.ndarray  # uint8, all names in UTF-8 one after the other
    name_start: np.ndarray  # int64 [N + 1]
    held_out: np.ndarray  # bool [N]: in the source's own evaluation split
    multi_label: bool  # images may have any number of labels, also none
    order: Order = "given"  # of the classes
    left_out: dict[str, int] = field(default_factory=dict)  # how many of each kind were left out: "hidden file"
    eval_only: bool = False  # the source is an evaluation set: there is nothing to train on

    def __len__(self) -> int:
        return len(self.file)

    def name(self, index: int) -> str:
        return bytes(self.names[self.name_start[index] : self.name_start[index + 1]]).decode("utf-8", "surrogateescape")

    def labels_of(self, index: int) -> list[int]:
        labels: list[int] = self.labels[self.label_start[index] : self.label_start[index + 1]].tolist()
        return labels

    def first_labels(self) -> np.ndarray:
        """int32 [N]: the first label of each image, -1 if it has none."""
        first = np.full(len(self), -1, np.int32)
        labelled = np.diff(self.label_start) > 0
        first[labelled] = self.labels[self.label_start[:-1][labelled]]
        return first

    def save(self, folder: Path) -> None:
        for name in _ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name))
        rest = {name: getattr(self, name) for name in _REST}
        (folder / "listing.json").write_text(json.dumps(rest))

    @classmethod
    def load(cls, folder: Path) -> "Listing":
        rest = json.loads((folder / "listing.json").read_text())
        files = [SourceFile(kind, path, tuple(shape), *names) for kind, path, shape, *names in rest.pop("files")]
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        return cls(files=files, **rest, **arrays)


_ARRAYS = ("file", "offset", "size", "labels", "label_start", "names", "name_start", "held_out")
_REST = ("classes", "files", "multi_label", "order", "left_out", "eval_only")


class ListingBuilder:
    """Collects the images of a source one by one. What their labels mean is decided in the end, for all at once.

    `named`: labels are class names, also if they are numbers.
    """

    def __init__(self, *, named: bool = False) -> None:
        self.files: list[SourceFile] = []
        self.multi_label = False
        self.held_out = False  # of the images added from now on
        self.eval_only = False  # see Listing
        self.left_out: Counter[str] = Counter()  # files by kind, in the singular: "hidden file"
        self.usable = 0  # images, as far as is known before they are decoded
        self._named = named
        self._current = -1  # index into files
        self._faulty: dict[tuple[int, str], int] = {}  # (file, fault) -> index into files
        self._numbers: dict[Label, int] = {}  # label -> number in order of appearance
        self._seen: dict[str | Label, int] = {}  # the same, by the label as it was given
        self._class_of: dict[str, str] = {}
        self._file, self._offset, self._size = array("i"), array("q"), array("q")
        self._labels, self._label_start = array("i"), array("q", [0])
        self._names, self._name_start = bytearray(), array("q", [0])
        self._held_out = array("b")

    def __len__(self) -> int:
        return len(self._file)

    def add_file(
        self,
        kind: Kind,
        path: AnyPath | str,
        shape: tuple[int, ...] = (),
        *,
        shown: AnyPath | str = "",
        border: int = 0,
    ) -> int:
        """Images added from now on are in this file. Returns its index in `files`."""
        self._current = len(self.files)
        self.files.append(SourceFile(kind, str(path), shape, str(shown), border=border))
        return self._current

    def labels_refer_to(self, names: list[str] | None) -> None:
        """Labels that are indices refer to these class names of the source, whatever the order of the final ones."""
        self._class_of = {str(index): name for index, name in enumerate(names or [])}
        self._seen = {}

    def add(
        self, name: str, labels: Iterable[str | Label], offset: int = 0, size: int = 0, *, file: int | None = None
    ) -> None:
        """Adds an image that is in the file added last, or in files[file]."""
        self._add(name, map(self._number, labels), offset, size, self._current if file is None else file)
        self.usable += 1

    def add_faulty(self, name: str, fault: str, *, file: int | None = None) -> None:
        """Adds an image that cannot be used; `fault` says why, after its name: "has no label"."""
        self._add(name, (), 0, 0, self._faulty_file(self._current if file is None else file, fault))

    def _add(self, name: str, labels: Iterable[int], offset: int, size: int, file: int) -> None:
        self._file.append(file)
        self._offset.append(offset)
        self._size.append(size)
        self._labels.extend(labels)
        self._label_start.append(len(self._labels))
        self._names += name.encode("utf-8", "surrogateescape")
        self._name_start.append(len(self._names))
        self._held_out.append(self.held_out)

    def _number(self, given: str | Label) -> int:
        number = self._seen.get(given)
        if number is None:
            if self._named and isinstance(given, str):
                text, named = given, True  # with its spaces: 'a' and ' a' are two folders
            else:
                text, named = given if isinstance(given, Label) else read_label(given)
            name = self._class_of.get(text)
            label = Label(text, named or self._named) if name is None else Label(name, named=True)
            number = self._seen[given] = self._numbers.setdefault(label, len(self._numbers))
        return number

    def _faulty_file(self, file: int, fault: str) -> int:
        key = (file, fault)
        if key not in self._faulty:
            self._faulty[key] = len(self.files)
            self.files.append(self.files[file]._replace(fault=fault))
        return self._faulty[key]

    def finish(self, classes: list[str] | None, where: str) -> Listing:
        """`classes`: the names in label order, None: those that occur. Raises UserError if a label is none of them.

        An image without the label that it should have is faulty.
        """
        resolved = resolve(list(self._numbers), classes, where)
        if classes is None:
            _check_distinct(resolved.names, where)
        labels = resolved.indices[np.asarray(self._labels, np.int64)]
        label_start = np.asarray(self._label_start, np.int64)
        file = np.asarray(self._file, np.int32)
        image_of = np.repeat(np.arange(len(file)), np.diff(label_start))
        for image in np.unique(image_of[labels == MISSING]).tolist():
            file[image] = self._faulty_file(int(file[image]), "has no label")
        has_label = labels != MISSING
        if resolved.order in ("numeric", "alphabetical"):
            held_out = np.asarray(self._held_out, np.bool_)[image_of[has_label]]
            self._check_trained(labels[has_label], held_out, resolved.names, where)
        label_start = np.concatenate([np.zeros(1, np.int64), np.cumsum(has_label)])[label_start]
        return Listing(
            classes=resolved.names,
            files=self.files,
            file=file,
            offset=np.asarray(self._offset, np.int64),
            size=np.asarray(self._size, np.int64),
            labels=labels[has_label],
            label_start=label_start,
            names=np.frombuffer(bytes(self._names), np.uint8),
            name_start=np.asarray(self._name_start, np.int64),
            held_out=np.asarray(self._held_out, np.bool_),
            multi_label=self.multi_label,
            order=resolved.order,
            left_out=dict(self.left_out),
            eval_only=self.eval_only,
        )

    def _check_trained(self, labels: np.ndarray, held_out: np.ndarray, names: list[str], where: str) -> None:
        """Raises UserError if a class is evaluated and not trained: then a split has indices, or names of its own.

        With several labels per image, a rare one may be in one split only, but not all of them.
        """
        evaluated, trained = np.unique(labels[held_out]), np.unique(labels[~held_out])
        unknown = np.setdiff1d(evaluated, trained)
        if len(unknown) and len(trained) and (not self.multi_label or len(unknown) == len(evaluated)):
            raise UserError(
                f"{where} has the label '{brief(names[unknown[0]])}' among the images to evaluate on, and not among "
                "those to train on: correct the labels, or list all class names in label order, one per line, in a "
                "file given as --classes"
            )


def _check_distinct(names: list[str], where: str) -> None:
    """Raises UserError if two names look the same: an accented letter is one character in one, and two in the other."""
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(unicodedata.normalize("NFC", name), name)) != name:
            raise UserError(
                f"{where} has two classes that both look like '{brief(name)}', in characters {brief(ascii(other))} and "
                f"{brief(ascii(name))}: rename one as the other, or list all class names in a file given as --classes"
            )


REPEATED = "row that repeats an image"


def without_repeats(listing: Listing, where: str) -> Listing:
    """Leaves out each path and URL that occurs before with the same labels, and counts them.

    Raises UserError if one occurs with other labels, or in both splits.
    """
    is_named = np.array([file.kind in ("path", "url") and not file.fault for file in listing.files], np.bool_)
    rows = np.flatnonzero(is_named[listing.file])
    digests = b"".join(hashlib.blake2b(_place(listing, row), digest_size=8).digest() for row in rows.tolist())
    _, first, inverse = np.unique(np.frombuffer(digests, np.uint64), return_index=True, return_inverse=True)
    earliest = rows[first][inverse]
    kept = np.ones(len(listing), np.bool_)
    for row, earlier in np.stack([rows, earliest], axis=1)[rows != earliest].tolist():
        if _place(listing, row) != _place(listing, earlier):
            continue  # two names with the same digest
        labels, before = (sorted(listing.classes[label] for label in listing.labels_of(one)) for one in (row, earlier))
        if labels != before:
            raise UserError(
                f"{where} has {brief(listing.name(row))} twice, with the labels {brief(before)} and {brief(labels)}: "
                'list an image once, with all its labels, separated by ";"'
            )
        if listing.held_out[row] != listing.held_out[earlier]:
            raise UserError(f"{where} has {brief(listing.name(row))} in both splits: remove it from one of them")
        kept[row] = False
    return listing if kept.all() else _select(listing, kept, {REPEATED: int((~kept).sum())})


def _place(listing: Listing, row: int) -> bytes:
    """The URL, or the path in its shortest form."""
    name = listing.name(row)
    is_path = listing.files[listing.file[row]].kind == "path"
    return (os.path.normpath(name) if is_path else name).encode("utf-8", "surrogateescape")


def _select(listing: Listing, kept: np.ndarray, left_out: Mapping[str, int]) -> Listing:
    """The images with kept[i]. left_out: what is added to its counts."""
    labels, names = np.diff(listing.label_start), np.diff(listing.name_start)
    zero = np.zeros(1, np.int64)
    return replace(
        listing,
        **{name: getattr(listing, name)[kept] for name in ("file", "offset", "size", "held_out")},
        labels=listing.labels[np.repeat(kept, labels)],
        label_start=np.concatenate([zero, np.cumsum(labels[kept])]),
        names=listing.names[np.repeat(kept, names)],
        name_start=np.concatenate([zero, np.cumsum(names[kept])]),
        left_out=dict(Counter(listing.left_out) + Counter(left_out)),
    )


def join(train: Listing, held_out: Listing) -> Listing:
    """Both listings as one, the images of the second one held out. Classes are the first one's."""
    ends = {"label_start": train.label_start[-1], "name_start": train.name_start[-1]}
    shifted: dict[str, Any] = {
        name: np.concatenate([getattr(train, name), getattr(held_out, name)[1:] + end]) for name, end in ends.items()
    }
    rest: dict[str, Any] = {
        name: np.concatenate([getattr(train, name), getattr(held_out, name)])
        for name in ("offset", "size", "labels", "names")
    }
    return Listing(
        classes=train.classes,
        files=[*train.files, *held_out.files],
        file=np.concatenate([train.file, held_out.file + np.int32(len(train.files))]),
        held_out=np.arange(len(train) + len(held_out)) >= len(train),
        multi_label=train.multi_label or held_out.multi_label,
        order=train.order,
        left_out=dict(Counter(train.left_out) + Counter(held_out.left_out)),
        **shifted,
        **rest,
    )


def describe_classes(listing: Listing) -> str:
    """What the labels were taken for and in which order, for people."""
    if not listing.classes:
        return "no labels"
    names = [name if name.isprintable() else repr(name) for name in listing.classes]
    shown = ", ".join(names if len(names) <= 6 else [*names[:4], "...", names[-1]])
    empty = len(names) - len(np.unique(listing.labels))
    without = f", {empty:,} of them without an image" if empty else ""
    if listing.order == "index":
        return f"labels are class indices, 0 to {len(names) - 1}{without}"
    if listing.order == "numeric":
        return f"{len(names):,} class names, which are numbers, in numeric order: {shown}{without}"
    order = "in alphabetical order" if listing.order == "alphabetical" else "in the given order"
    return f"{len(names):,} class names {order}: {shown}{without}"


def describe_left_out(left_out: dict[str, int]) -> str:
    """Counts of what was left out, for people: "2 hidden files and 1 duplicate"."""
    parts = [
        f"{count:,} {kind if count == 1 else _KIND.sub(lambda noun: noun[1] + 's', kind, count=1)}"
        for kind, count in sorted(left_out.items())
    ]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


_KIND = re.compile(r"\b(file|folder|image|duplicate|member|shard|link|row)\b")
