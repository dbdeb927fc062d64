"""Which split a name belongs to: one rule for folders, shards and Parquet files, on local disks and in buckets."""

import glob
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from fastvit_engine.errors import UserError

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")

_WORDS: dict[str, Part] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "eval": "val",
    "evaluation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
# What may stand beside the split in the name of a folder of a split; any other word makes it the name of a class.
_NEUTRAL = {"set", "sets", "split", "splits", "data", "dataset", "images", "image", "imgs", "img", "photos", "folder"}
_NEUTRAL |= {"of", "part", "full", "mini", "small", "seg", "ilsvrc", "imagenet"}
_ENDINGS = re.compile(r"(\.tar|\.tar\.gz|\.tgz|\.parquet)$", re.IGNORECASE)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[^\W\d_]+")
_JOINED = re.compile(r"(train|training|val|validation|eval|test)(set|sets|data|images|split)")  # "trainset", "testdata"


def split_of(name: str, *, folder: bool = False) -> Part | None:
    """The split that the name of a file says, or of a folder; None if it says none, or several.

    A file belongs to a split if one of its words names it: imagenet1k-train-0000.tar, val2017.parquet. A folder may
    have the name of a class, so it belongs to a split only if nothing else is in its name: val, train2017, test_images,
    but not "training shoes".
    """
    words = _words(name)
    named = _named(words)
    if len(named) != 1 or (folder and not all(_is_split_word(word) or _is_neutral(word) for word in words)):
        return None
    return next(iter(named))


def _split_of_folders(path: str) -> Part | None:
    folders = path.split("/")[:-1]
    return next((part for name in reversed(folders) if (part := split_of(name, folder=True))), None)


def may_name_split(name: str) -> bool:
    """Whether any word of a name is that of a split, as in the class "training shoes" or the folder "birds-train"."""
    return bool(_named(_words(name)))


def without_split(name: str) -> str:
    """The words of a name besides those of a split: "cat" for "train_cat" and for "cat-test"."""
    return " ".join(word for word in _words(name) if not _is_split_word(word))


def _words(name: str) -> list[str]:
    stem = _ENDINGS.sub("", name.rstrip("/").rpartition("/")[2])
    words: list[str] = []
    for word in _WORD.findall(stem):
        joined = _JOINED.fullmatch(word.lower())
        words += joined.groups() if joined else [word.lower()]
    return words


def _named(words: Iterable[str]) -> set[Part]:
    return {_WORDS[word] for word in words if word in _WORDS}


def _is_split_word(word: str) -> bool:
    return word in _WORDS


def _is_neutral(word: str) -> bool:
    return word in _NEUTRAL or len(word) == 1


@dataclass(frozen=True)
class Splits:
    """Names sorted into splits, in the order in which they were given.

    A name that says none is in the split of the nearest folder of its path that says one, as val in val/000000.tar.
    """

    train: list[str]
    val: list[str]
    test: list[str]
    unnamed: list[str] = field(default_factory=list)  # that say no split, or several

    @classmethod
    def of(cls, names: Sequence[str], *, folder: bool = False) -> "Splits":
        found: dict[Part | None, list[str]] = {None: [], **{part: [] for part in PARTS}}
        for name in names:
            found[split_of(name, folder=folder) or _split_of_folders(name)].append(name)
        return cls(found["train"], found["val"], found["test"], found[None])

    def named(self) -> dict[Part, list[str]]:
        """The splits that occur."""
        groups: dict[Part, list[str]] = {"train": self.train, "val": self.val, "test": self.test}
        return {part: names for part, names in groups.items() if names}

    @property
    def held_out(self) -> Part:
        """The split to evaluate on: val, or test if there is no val."""
        return "val" if self.val or not self.test else "test"

    @property
    def mixed(self) -> bool:
        """Whether some names say a split and others do not, or a name says several: only a person can tell them."""
        return bool(self.unnamed) and (bool(self.named()) or any(may_name_split(name) for name in self.unnamed))

    def globs(self) -> list[str]:
        """A pattern for each split that occurs and for the names without one, with what it matches."""
        groups = [(f"named {part}", names) for part, names in self.named().items()]
        groups += [("others", self.unnamed)] if self.unnamed else []
        everything = [*self.train, *self.val, *self.test, *self.unnamed]
        return [f"'{pattern_of(names, everything)}' ({what})" for what, names in groups]


def pattern_of(names: Sequence[str], everything: Iterable[str]) -> str:
    """A glob, or else a brace pattern, that matches `names` and nothing else of `everything`."""
    if len(names) == 1:
        return glob.escape(names[0])
    start = os.path.commonprefix(names)
    shortest = min(len(name) for name in names) - len(start)
    end = os.path.commonprefix([name[::-1] for name in names])[::-1]
    end = end[max(0, len(end) - shortest) :]
    pattern = f"{glob.escape(start)}*{glob.escape(end)}"
    if any(fnmatchcase(name, pattern) for name in set(everything) - set(names)):
        return "{" + ",".join(map(glob.escape, names)) + "}"
    return pattern


@dataclass(frozen=True)
class Choice:
    """The files of a folder that serve one purpose, and a clause that says how they were chosen."""

    names: list[str]
    note: str  # "" if every file of the folder serves


def choose_files(names: Sequence[str], purpose: Literal["train", "eval"], where: str, key: str) -> Choice:
    """The files of `where` to train or evaluate on, by their names; all of them if no name says a split.

    Raises UserError if only some names say one, or if none says that of the purpose; `key` is what to set instead.
    """
    splits = Splits.of(names)
    folder = where.rstrip("/")
    if splits.mixed:
        raise UserError(
            f"{where} holds shards of several kinds: set {key} to the pattern that you mean, in {folder}/: "
            f"{', '.join(splits.globs())}"
        )
    named = splits.named()
    if not named:
        return Choice(list(names), "")
    part: Part = "train" if purpose == "train" else splits.held_out
    if part not in named:
        what = " and ".join(named)
        pattern = pattern_of([name for group in named.values() for name in group], names)
        raise UserError(
            f"{where} holds shards that are named {what}, and none that is named {part}: name the folder of the "
            f"{part} shards, or set {key} to '{folder}/{pattern}' if you mean these"
        )
    others = [f"{len(group):,} named {other}" for other, group in named.items() if other != part]
    left_out = f" (left out: {' and '.join(others)})" if others else ""
    return Choice(named[part], f"{key}: the {len(named[part]):,} of {where} that are named {part}{left_out}")
