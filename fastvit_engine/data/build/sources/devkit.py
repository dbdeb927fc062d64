"""Files of labels for flat tars, ImageNet-1k's among them, whose validation labels use a numbering of their own."""

import json
import lzma
import re
import zlib
from typing import Any

from fastvit_engine.data.build.sources.matlab import read_structs
from fastvit_engine.data.shards.archive import open_forward
from fastvit_engine.data.shards.remote_path import AnyPath
from fastvit_engine.data.shards.tar import TarError, iterate_members
from fastvit_engine.errors import UserError
from fastvit_engine.storage.source import one_line
from fastvit_engine.text import read_lines, read_text

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_LARGEST = 1 << 24  # bytes of a file in it; the real ones have less than 200 kB
_CLASSES = 1000
_MOST_CLASSES = 1_000_000
_WNID = re.compile(r"n\d{1,20}", re.ASCII)


def validation_labels(path: AnyPath) -> list[list[str]]:
    """The words of each line of a file of labels: a label, or an image's file name and its label.

    ILSVRC's ground truth (its devkit, or the text file of it beside the devkit) comes out as WordNet ids.
    """
    try:
        if path.name.endswith(".tar.gz"):
            return [[wnid] for wnid in _devkit_labels(path)]
        lines = [re.split(r"[,\s]+", line) for line in read_lines(path)]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the file of labels {path} cannot be read ({reason}): correct --labels") from error
    if "ground_truth" in path.name:
        devkit = path.parent / DEVKIT
        meta = path.parent / "meta.mat"
        if meta.exists():
            wnids = _wnids(_beside(meta), meta)
        elif devkit.exists():
            wnids = _wnids(_devkit_file(devkit, "meta.mat"), devkit)
        else:
            raise UserError(
                f"{path} numbers the classes as the devkit's meta.mat says, which is not beside it: "
                f"put {DEVKIT} or its meta.mat there"
            )
        return [[_wnid(wnids, line[0], path)] for line in lines]
    return lines


def listed_labels(path: AnyPath) -> list[list[int]]:
    """The class indices of each image, any number of them, from a JSON list of lists, as ReaL's real.json is."""
    try:
        lists = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"the file of labels {path} cannot be read ({reason}): correct --labels") from error
    if not isinstance(lists, list) or not all(map(_is_list_of_indices, lists)):
        raise UserError(f"{path} is no list with a list of class indices for each image: correct it, or --labels")
    return lists


def _is_list_of_indices(value: Any) -> bool:
    return isinstance(value, list) and all(type(index) is int and 0 <= index < _MOST_CLASSES for index in value)


def class_ids(devkit: AnyPath) -> list[str]:
    """The WordNet ids of the classes, in label order; meta.mat has groups of classes too, with numbers above 1,000."""
    wnids = _wnids(_devkit_file(devkit, "meta.mat"), devkit)
    return sorted(wnid for number, wnid in wnids.items() if int(number) <= _CLASSES)


def _devkit_labels(devkit: AnyPath) -> list[str]:
    numbers = _devkit_file(devkit, "ILSVRC2012_validation_ground_truth.txt").decode("ascii", "replace").split()
    wnids = _wnids(_devkit_file(devkit, "meta.mat"), devkit)
    return [_wnid(wnids, number, devkit) for number in numbers]


def _devkit_file(devkit: AnyPath, name: str) -> bytes:
    try:
        with open_forward(str(devkit)) as (read, size):
            for member in iterate_members(read, size):
                if member.is_file and member.name.endswith(f"/data/{name}"):
                    if member.size > _LARGEST:
                        raise TarError(f"has a {name} of {member.size:,} bytes", member.start)
                    return read(member.data, member.size)
    except (OSError, EOFError, TarError, zlib.error, lzma.LZMAError) as error:
        reason = f"it {error}" if isinstance(error, TarError) else one_line(error)
        raise UserError(f"the devkit {devkit} cannot be read ({reason}): download it again") from error
    raise UserError(f"{devkit} holds no data/{name}: it is not ILSVRC2012's devkit; download it again")


def _beside(meta: AnyPath) -> bytes:
    try:
        with meta.open("rb") as file:
            return file.read(_LARGEST)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(
            f"{meta} cannot be read ({reason}): correct its permissions or download the devkit again"
        ) from error


def _wnids(meta: bytes, where: AnyPath) -> dict[str, str]:
    """ILSVRC2012_ID -> WordNet id, from meta.mat."""
    found: dict[str, str] = {}
    try:
        for number, wnid in read_structs(meta, "synsets", ("ILSVRC2012_ID", "WNID")):
            if not isinstance(number, float) or not number.is_integer() or str(int(number)) in found:
                raise ValueError(f"the class number {number} is no whole number or comes twice")
            if not isinstance(wnid, str) or not _WNID.fullmatch(wnid):
                raise ValueError(f"class {int(number)} has no WordNet id")
            found[str(int(number))] = wnid
    except ValueError as error:
        raise UserError(f"meta.mat of {where} cannot be read ({one_line(error)}): download the devkit again") from error
    return found


def _wnid(wnids: dict[str, str], number: str, where: AnyPath) -> str:
    if number not in wnids:
        raise UserError(f"{where} has the label {number:.40}, which meta.mat does not know: download the devkit again")
    return wnids[number]
