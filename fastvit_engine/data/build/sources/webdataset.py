"""WebDataset shards that are to be made anew."""

import contextlib
import glob
import json
import os
from pathlib import Path
from typing import NamedTuple

from braceexpand import braceexpand

from fastvit_engine.data.build.parallel import ordered_map
from fastvit_engine.data.build.sources.context import Context, split_of_names
from fastvit_engine.data.build.sources.listing import Listing, ListingBuilder
from fastvit_engine.data.build.sources.tars import is_tar_name, members, plain_tars
from fastvit_engine.data.shards.names import read_info
from fastvit_engine.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")


class Found(NamedTuple):
    """A sample in a shard."""

    key: str
    labels: list[str]
    offset: int  # of its first member's header
    size: int  # up to the end of its last member


def list_webdataset(path: Path, context: Context) -> Listing:
    """A shard, a folder of them, or a glob or brace pattern: an image and a `cls` or `json` member a sample.

    `json` gives the labels of a sample as "labels" (several) or "label". The shards of a dataset.json keep their split
    and class names; otherwise shards named train... and val... or test... do. Other members are left out.
    """
    train, held_out = _shards(path, context)
    info = read_info(train[0].parent)
    names = info.classes if info else None
    shards = list(zip(plain_tars([*train, *held_out], context), [*train, *held_out], strict=True))
    context.progress.start("listing", len(shards), "shards")
    builder = ListingBuilder()
    builder.labels_refer_to(names)
    with contextlib.closing(ordered_map(_samples, shards, workers=context.workers)) as results:
        for (plain, shard), samples in zip(shards, results, strict=True):
            builder.held_out = shard in held_out
            builder.add_file("sample", plain)
            for sample in samples:
                builder.multi_label |= len(sample.labels) != 1
                builder.add(sample.key, sample.labels, sample.offset, sample.size)
            context.progress.update(len(builder.files))
    return builder.finish(context.classes or names, str(path))


def _shards(path: Path, context: Context) -> tuple[list[Path], list[Path]]:
    if path.is_dir():
        info = read_info(path)
        if info is not None:
            return [path / name for name in sorted(info.train.shards)], [
                path / name for name in sorted(info.eval.shards)
            ]
        train, held_out, left_out = split_of_names(sorted(name for name in os.listdir(path) if is_tar_name(name)))
        if left_out:
            context.say(f"{path}: left out {', '.join(left_out[:3])}{' ...' if left_out[3:] else ''}")
        return [path / name for name in train], [path / name for name in held_out]
    shards = sorted(Path(name) for part in braceexpand(str(path)) for name in (glob.glob(part) or [part]))
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(f"there is no shard {missing[0]}: correct the name")
    return shards, []


def _samples(shard: tuple[Path, Path]) -> list[Found]:
    """The samples of a plain tar; UserError naming the original shard and the key where one lacks a member."""
    plain, name = shard
    samples: list[Found] = []
    parts: dict[str, tuple[int, int]] = {}  # extension -> offset, size
    key, start, end = "", 0, 0
    with open(plain, "rb") as file:

        def finish() -> None:
            if not parts:
                return
            where = f"sample '{key}' of shard {name}"
            if not any(extension in parts for extension in IMAGE_EXTENSIONS):
                raise UserError(
                    f"{where} has no image, only {sorted(parts)}: the members of a sample must stand next to each other"
                )
            labels = _labels(
                {ext: os.pread(file.fileno(), *parts[ext][::-1]) for ext in ("cls", "json") if ext in parts}, where
            )
            samples.append(Found(key, labels, start, end - start))

        for member in members(plain):
            folder, _, base = member.name.rpartition("/")
            stem, dot, extension = base.partition(".")
            if not stem or not dot:
                continue
            member_key = f"{folder}/{stem}" if folder else stem
            if member_key != key:
                finish()
                key, start, parts = member_key, member.header, {}
            if extension.lower() in parts:
                raise UserError(f"sample '{key}' of shard {name} has two '{extension}' members: make the shard again")
            parts[extension.lower()] = (member.offset, member.size)
            end = member.offset + member.size
        finish()
    return samples


def _labels(parts: dict[str, bytes], where: str) -> list[str]:
    try:
        if "json" in parts:
            content = json.loads(parts["json"])
            if isinstance(content, dict) and isinstance(content.get("labels"), list):
                return [str(label) for label in content["labels"]]
            if "cls" not in parts and isinstance(content, dict) and "label" in content:
                return [str(content["label"])]
        if "cls" in parts:
            return [parts["cls"].decode().strip()]
    except ValueError as error:
        raise UserError(f"{where} has a label that cannot be read ({error}): make the shard again") from error
    raise UserError(f"{where} has neither a 'cls' member nor labels in a 'json' member: make the shard again with one")
