"""Files of labels for flat tars, ImageNet-1k's among them, whose validation labels use a numbering of their own."""

import io
import lzma
import math
import re
import zlib

from fastvit_engine.data.shards.archive import open_forward
from fastvit_engine.data.shards.remote_path import AnyPath
from fastvit_engine.data.shards.tar import TarError, iterate_members
from fastvit_engine.errors import UserError
from fastvit_engine.storage.source import one_line
from fastvit_engine.text import read_lines

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_LARGEST = 1 << 24  # bytes of a file in it; the real ones have less than 200 kB

_MOST_SYNSETS = 100_000  # the real file has 1,860


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
            with meta.open("rb") as file:
                wnids = _wnids(file.read(_LARGEST), meta)
        elif devkit.exists():
            wnids = _wnids(_devkit_file(devkit, "meta.mat"), devkit)
        else:
            raise UserError(
                f"{path} numbers the classes as the devkit's meta.mat says, which is not beside it: "
                f"put {DEVKIT} or its meta.mat there"
            )
        return [[_wnid(wnids, line[0], path)] for line in lines]
    return lines


def _devkit_labels(devkit: AnyPath) -> list[str]:
    numbers = _devkit_file(devkit, "ILSVRC2012_validation_ground_truth.txt").decode().split()
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


def _wnids(meta: bytes, where: AnyPath) -> dict[str, str]:
    """ILSVRC2012_ID -> WordNet id, from meta.mat."""
    try:
        from scipy.io import loadmat, whosmat
    except ImportError as error:
        raise UserError("reading ILSVRC2012's meta.mat needs scipy: pip install scipy") from error
    try:
        if any(math.prod(shape) > _MOST_SYNSETS for _, shape, _ in whosmat(io.BytesIO(meta))):
            raise ValueError(f"it has more than {_MOST_SYNSETS:,} synsets")
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        return {str(int(synset["ILSVRC2012_ID"])): str(synset["WNID"]) for synset in synsets}
    except Exception as error:  # scipy raises many kinds on a damaged file
        raise UserError(f"meta.mat of {where} cannot be read ({one_line(error)}): download the devkit again") from error


def _wnid(wnids: dict[str, str], number: str, where: AnyPath) -> str:
    if number not in wnids:
        raise UserError(f"{where} has the label {number}, which meta.mat does not know: download the devkit again")
    return wnids[number]
