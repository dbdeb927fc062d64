"""Decides what `fastvit data make` writes: which images, in which order, in which shards."""

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastvit_engine.data.build.parallel import Counter, Workers, ordered_map
from fastvit_engine.data.build.sources.listing import Listing
from fastvit_engine.data.build.sources.reading import SourceReader
from fastvit_engine.data.shards.names import Split
from fastvit_engine.errors import UserError
from fastvit_engine.observe.progress import WorkProgress
from fastvit_engine.observe.units import counted

_HASHED_AT_ONCE = 1024
_VALIDATION_IMAGE = re.compile(r"(?:^|_)ILSVRC2012_val_(\d{8})(?!\d)", re.ASCII)


class Shard(NamedTuple):
    """One shard to write: which positions of the shuffled order it holds."""

    name: str
    split: Split
    start: int  # first and last + 1 position in the split's order
    end: int


@dataclass(frozen=True)
class Packing:
    """The listing, and the order in which its images are written to shards.

    It is stored, so that a resumed run, and the parts of a run on several machines, use the same one; and it is
    memory-mapped, so that it needs little memory.
    """

    arguments: dict[str, Any]
    listing: Listing
    train: np.ndarray  # int64, indices into the listing
    eval: np.ndarray
    eval_fraction: float | None
    duplicates: int
    folder: Path | None = field(default=None, compare=False)  # that it was loaded from

    def __getstate__(self) -> dict[str, Any]:
        """The name of its folder, so that a process that unpickles it maps the same files into memory."""
        return self.__dict__ if self.folder is None else {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        folder = state["folder"]
        self.__dict__.update(state if folder is None else Packing.load(folder).__dict__)

    def shards(self) -> list[Shard]:
        """Returns all shards; those of a split differ by at most one sample."""
        shards: list[Shard] = []
        orders: dict[Split, np.ndarray] = {"train": self.train, "eval": self.eval}
        for split, order in orders.items():
            count = math.ceil(len(order) / self.arguments["samples_per_shard"])
            shards += [
                Shard(f"{split}-{n:06d}.tar", split, len(order) * n // count, len(order) * (n + 1) // count)
                for n in range(count)
            ]
        return shards

    def indices(self, shard: Shard) -> np.ndarray:
        return (self.train if shard.split == "train" else self.eval)[shard.start : shard.end]

    def save(self, folder: Path) -> None:
        """Writes its files into an empty folder."""
        self.listing.save(folder)
        np.save(folder / "train.npy", self.train)
        np.save(folder / "eval.npy", self.eval)
        rest = {"arguments": self.arguments, "eval_fraction": self.eval_fraction, "duplicates": self.duplicates}
        (folder / "packing.json").write_text(json.dumps(rest))

    @classmethod
    def load(cls, folder: Path) -> "Packing":
        """Reads what `save` has written, also in an earlier version, where one of the files was called plan.json."""
        earlier = folder / "plan.json"
        rest = json.loads((earlier if earlier.exists() else folder / "packing.json").read_text())
        orders = {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in ("train", "eval")}
        return cls(listing=Listing.load(folder), folder=folder, **orders, **rest)


def make_packing(
    listing: Listing,
    arguments: dict[str, Any],
    *,
    eval_fraction: float | None,
    workers: Workers,
    progress: WorkProgress,
) -> Packing:
    """Splits the listing and shuffles each split globally.

    Each class gives the same fraction of its images to the eval split, within one image, and keeps at least one to
    train on, unless the source has a split of its own. ImageNet's validation images, if they are that split, keep the
    order of their numbers: other labels of them, such as ReaL's, are lists in that order.
    """
    kept = np.ones(len(listing), np.bool_)
    if arguments["dedup"]:
        kept = _first_of_each(listing, workers, progress)
    # A generator's raw numbers, unlike what NumPy derives from them, are the same in all its versions.
    order = np.argsort(np.random.Philox(arguments["seed"]).random_raw(len(listing)), kind="stable")
    order = order[kept[order]]
    if eval_fraction is None:
        held_out = listing.held_out[order]
    else:
        held_out = _stratified(listing.first_labels()[order], eval_fraction)
    train, evaluation = order[~held_out], order[held_out]
    if eval_fraction is None:
        evaluation = _by_number(listing, evaluation)
    if (not len(train) and not listing.eval_only) or (eval_fraction and not len(evaluation)):
        raise UserError(_too_few(listing.first_labels()[order], eval_fraction))
    return Packing(arguments, listing, train, evaluation, eval_fraction, duplicates=int(len(kept) - kept.sum()))


def _too_few(labels: np.ndarray, eval_fraction: float | None) -> str:
    images = counted(len(labels), "image")
    if eval_fraction is None:
        return f"all {images} are in the source's eval split: add images to train on"
    alone = np.unique(labels, return_counts=True)[1].max(initial=0) < 2
    images += ", no two of one class," if alone and len(labels) > 1 else ""
    wanted = "0" if alone else "0.5, or 0 to train on all of them"
    return f"{images} are too few for --eval-fraction {eval_fraction}: set --eval-fraction {wanted}"


def _by_number(listing: Listing, images: np.ndarray) -> np.ndarray:
    """ImageNet's validation images in the order of their numbers; any other images as they are."""
    numbers = np.empty(len(images), np.int64)
    for position, image in enumerate(images.tolist()):
        match = _VALIDATION_IMAGE.search(listing.name(image).rpartition("/")[2])
        if match is None:
            return images
        numbers[position] = int(match[1])
    return images if len(np.unique(numbers)) < len(images) else images[np.argsort(numbers)]


def _stratified(labels: np.ndarray, fraction: float) -> np.ndarray:
    """Chooses `fraction` of each class, within one image, given the classes of shuffled images: bool [N].

    Never a whole class: it would be evaluated without having been trained.
    """
    order = np.argsort(labels, kind="stable")
    # Evenly spaced positions in the class order: round(n * fraction) of them in any run of n.
    marks = np.floor(np.arange(len(labels) + 1) * fraction + 0.5)
    by_class = np.diff(marks) > 0
    _, first, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    if len(first):
        whole = np.add.reduceat(by_class, first, dtype=np.int64) == sizes
        by_class[first[whole]] = False
    chosen = np.zeros(len(labels), np.bool_)
    chosen[order] = by_class
    return chosen


def _first_of_each(listing: Listing, workers: Workers, progress: WorkProgress) -> np.ndarray:
    """Finds duplicates: bool [N], False for images whose bytes occur earlier, or in the source's own eval split."""
    if any(file.kind == "url" for file in listing.files):
        raise UserError(
            "--dedup reads every image twice: make shards of URLs first, then make those again with --dedup"
        )
    done = Counter()
    progress.start("looking for duplicates in", len(listing), "images")
    starts = range(0, len(listing), _HASHED_AT_ONCE)
    parts = ordered_map(
        partial(_hashes, SourceReader(listing), len(listing), done),
        starts,
        workers=workers,
        while_waiting=lambda: progress.update(done.value),
    )
    return first_of_each(np.concatenate(list(parts)), preferred=listing.held_out)


def _hashes(reader: SourceReader, images: int, done: Counter, start: int) -> np.ndarray:
    """The hashes of up to 1,024 images of a listing of so many, uint64 [n, 2]."""
    digests = bytearray()
    for index in range(start, min(start + _HASHED_AT_ONCE, images)):
        try:
            content = reader.read(index).image
        except (OSError, ValueError):
            content = b"unreadable" + index.to_bytes(8, "little")  # no duplicate; fails again when it is written
        digests += hashlib.blake2b(content, digest_size=16).digest()
        done.add()
    return np.frombuffer(bytes(digests), np.uint64).reshape(-1, 2)


def first_of_each(digests: np.ndarray, preferred: np.ndarray | None = None) -> np.ndarray:
    """Marks one of each distinct row, the first or the first of the `preferred`: bool [N] for uint64 [N, 2]."""
    last = np.zeros(len(digests), np.bool_) if preferred is None else ~preferred
    order = np.lexsort((last, digests[:, 1], digests[:, 0]))  # stable: otherwise in the given order
    first = np.ones(len(digests), np.bool_)
    first[order[1:]] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
    return first
