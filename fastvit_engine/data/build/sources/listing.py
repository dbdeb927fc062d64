"""Where every image of a source is and how it is labelled, as a few arrays."""

import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from fastvit_engine.data.shards.usable import PLAUSIBLE_CLASSES
from fastvit_engine.errors import UserError

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
        rest = {"classes": self.classes, "files": self.files, "multi_label": self.multi_label}
        (folder / "listing.json").write_text(json.dumps(rest))

    @classmethod
    def load(cls, folder: Path) -> "Listing":
        rest = json.loads((folder / "listing.json").read_text())
        files = [SourceFile(kind, path, tuple(shape)) for kind, path, shape in rest["files"]]
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        return cls(classes=rest["classes"], files=files, multi_label=rest["multi_label"], **arrays)


_ARRAYS = ("file", "offset", "size", "labels", "label_start", "names", "name_start", "held_out")


class ListingBuilder:
    """Collects the images of a source one by one. Labels are given as text and become indices in the end."""

    def __init__(self) -> None:
        self.files: list[SourceFile] = []
        self.texts: dict[str, int] = {}  # label text -> number in order of appearance
        self.multi_label = False
        self.held_out = False  # of the images added from now on
        self._class_of: dict[str, str] = {}
        self._file, self._offset, self._size = array("i"), array("q"), array("q")
        self._labels, self._label_start = array("i"), array("q", [0])
        self._names, self._name_start = bytearray(), array("q", [0])
        self._held_out = array("b")

    def __len__(self) -> int:
        return len(self._file)

    def add_file(self, kind: Kind, path: Path | str, shape: tuple[int, ...] = ()) -> None:
        """Images added from now on are in this file."""
        self.files.append(SourceFile(kind, str(path), shape))

    def labels_refer_to(self, names: list[str] | None) -> None:
        """Labels that are indices refer to these class names of the source, whatever the order of the final ones."""
        self._class_of = {str(index): name for index, name in enumerate(names or [])}

    def add(self, name: str, labels: Iterable[str], offset: int = 0, size: int = 0, *, file: int | None = None) -> None:
        """An image in the file that was added last, or in files[file]."""
        labels = (self._class_of.get(label, label) for label in labels)
        self._file.append(len(self.files) - 1 if file is None else file)
        self._offset.append(offset)
        self._size.append(size)
        self._labels.extend(self.texts.setdefault(label, len(self.texts)) for label in labels)
        self._label_start.append(len(self._labels))
        self._names += name.encode("utf-8", "surrogateescape")
        self._name_start.append(len(self._names))
        self._held_out.append(self.held_out)

    def finish(self, classes: list[str] | None, where: str) -> Listing:
        """`classes`: the names in label order, None: those that occur. Raises UserError if a label is none of them."""
        classes, indices = _class_indices(list(self.texts), classes, where)
        provisional = np.frombuffer(self._labels, np.int32) if self._labels else np.zeros(0, np.int32)
        return Listing(
            classes=classes,
            files=self.files,
            file=np.asarray(self._file, np.int32),
            offset=np.asarray(self._offset, np.int64),
            size=np.asarray(self._size, np.int64),
            labels=indices[provisional],
            label_start=np.asarray(self._label_start, np.int64),
            names=np.frombuffer(bytes(self._names), np.uint8),
            name_start=np.asarray(self._name_start, np.int64),
            held_out=np.asarray(self._held_out, np.bool_),
            multi_label=self.multi_label,
        )


def join(train: Listing, held_out: Listing) -> Listing:
    """Both listings as one, the images of the second one held out. Classes are the first one's."""
    ends = {"label_start": train.label_start[-1], "name_start": train.name_start[-1]}
    shifted = {
        name: np.concatenate([getattr(train, name), getattr(held_out, name)[1:] + end]) for name, end in ends.items()
    }
    rest = {
        name: np.concatenate([getattr(train, name), getattr(held_out, name)])
        for name in ("offset", "size", "labels", "names")
    }
    return Listing(
        classes=train.classes,
        files=[*train.files, *held_out.files],
        file=np.concatenate([train.file, held_out.file + np.int32(len(train.files))]),
        held_out=np.arange(len(train) + len(held_out)) >= len(train),
        multi_label=train.multi_label or held_out.multi_label,
        **shifted,
        **rest,
    )


def _class_indices(texts: Sequence[str], classes: list[str] | None, where: str) -> tuple[list[str], np.ndarray]:
    """Class names, and the class index (int32) of each text: a name of a class, or an index of one as a number."""
    numbers = [int(text) for text in texts if _is_number(text) and str(int(text)) == text]
    if classes is None:
        if len(numbers) == len(texts):
            if (largest := max(numbers, default=0)) >= PLAUSIBLE_CLASSES:
                raise UserError(
                    f"{where} has the label {largest:,}, and {PLAUSIBLE_CLASSES:,} classes are allowed: correct it, or "
                    "name the classes with --classes"
                )
            classes = [str(number) for number in range(max(numbers, default=-1) + 1)]
        else:
            classes = sorted(texts)
    by_name = {name: index for index, name in enumerate(classes)}
    if len(by_name) < len(classes):
        twice = next(name for index, name in enumerate(classes) if by_name[name] != index)
        raise UserError(f"the class names of {where} hold '{twice}' twice: give each class a name of its own")
    indices = np.zeros(len(texts), np.int32)
    for position, text in enumerate(texts):
        if text in by_name:
            indices[position] = by_name[text]
        elif _is_number(text) and int(text) < len(classes):
            indices[position] = int(text)
        else:
            raise UserError(
                f"{where} has the label '{text[:200]}', which is neither one of the {len(classes)} class names nor an "
                "index below that: correct the label or the class names"
            )
    return classes, indices


def _is_number(text: str) -> bool:
    """Whether a label may be an index: more digits than any index has are a name, and would take long to convert."""
    return text.isascii() and text.isdecimal() and len(text) < 20
