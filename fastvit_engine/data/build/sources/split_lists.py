"""A folder with a text list of images and labels for each split, as VTAB-1k is passed on."""

import contextlib
import re
from collections.abc import Sequence
from itertools import islice

from fastvit_engine.data.build.sources.context import Context
from fastvit_engine.data.build.sources.image_set import take_splits
from fastvit_engine.data.build.sources.listing import Listing, ListingBuilder, without_repeats
from fastvit_engine.data.build.sources.table import RowAdder, text_rows
from fastvit_engine.data.shards.remote_path import AnyPath
from fastvit_engine.data.shards.splits import split_of
from fastvit_engine.errors import UserError
from fastvit_engine.shown import brief

_BOTH = re.compile(r"train\d*_?val\d*", re.ASCII | re.IGNORECASE)  # train800val200, trainval


def holds_split_lists(path: AnyPath, names: Sequence[str]) -> bool:
    """Whether a folder with these names in it holds such lists."""
    for name in names:
        if _part(name) in ("train", "both"):
            with contextlib.suppress(UserError):  # other text, or none
                if any(not row.fault for row in islice(text_rows(path / name), 1)):
                    return True
    return False


def list_split_lists(path: AnyPath, context: Context) -> Listing:
    """The images that train.txt, val.txt, test.txt and trainval.txt name, each with numbers in its name or without.

    Each line is a path, relative to the folder, and a label. Trains on train and val together if there are a list of
    both and one of test, which is held out. Otherwise trains on train and holds out val, or test if there is no val.
    --leave-out names lists that are not taken. Raises UserError if an image is in both lists that are used, or there
    are several lists of a split.
    """
    found = [name for name in sorted(file.name for file in path.iterdir()) if _part(name)]
    train, held_out = _choose(take_splits(found, path, context), path, context)
    builder = ListingBuilder()
    used = [train] if held_out is None else [train, held_out]
    seen: set[str] = set()
    for name in used:
        builder.held_out = name == held_out
        rows, own = RowAdder(builder, path / name, context), set[str]()
        for row in text_rows(path / name):
            if not row.fault and row.image in (seen if builder.held_out else ()):
                raise UserError(
                    f"{brief(row.image)} is in {train} and in {name} of {path}, so that it would be trained and "
                    f"evaluated on: correct the lists, or leave one out: `{context.command('--leave-out', name)}`"
                )
            own.add(row.image)
            rows.add(row)
        seen |= own
    for name in sorted(set(found) - set(used)):
        builder.left_out[f"row of {name}"] += sum(1 for _ in text_rows(path / name))
    context.describe(
        f"lists of images, {train} (train) and {'no eval split' if held_out is None else f'{held_out} (eval)'}"
    )
    return without_repeats(builder.finish(context.classes, str(path)), str(path))


def _part(name: str) -> str | None:
    """The split of a list: train, val, test, or "both" for train and val; None for another file."""
    stem, dot, suffix = name.rpartition(".")
    if not dot or suffix != "txt" or name.startswith("."):
        return None
    return "both" if _BOTH.fullmatch(stem) else split_of(stem, folder=True)


def _choose(names: list[str], path: AnyPath, context: Context) -> tuple[str, str | None]:
    """The lists to train and to evaluate on."""
    by_part: dict[str | None, str] = {}
    for name in names:
        other = by_part.setdefault(_part(name), name)
        if other != name:
            raise UserError(
                f"{path} can be read in two ways, with {other} or {name} as a list of the same split: "
                f"`{context.command('--leave-out', name)}` or `{context.command('--leave-out', other)}`"
            )
    if "both" in by_part and ("test" in by_part or "train" not in by_part):
        return by_part["both"], by_part.get("test")
    if "train" not in by_part:
        one = f"{path}/{names[0] if names else 'LIST.txt'}"
        raise UserError(
            f"{path} has no list of images to train on, but {', '.join(names) or 'none at all'}: add one, or name one "
            f"list to take its images: `{context.command(source=one)}`"
        )
    return by_part["train"], by_part.get("val") or by_part.get("test")
