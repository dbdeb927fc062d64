"""Files of labels for flat tars, ImageNet-1k's among them, whose validation labels use a numbering of their own."""

import io
import re
import tarfile
from pathlib import Path

from fastvit_engine.errors import UserError
from fastvit_engine.text import read_lines

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


def validation_labels(path: Path) -> list[list[str]]:
    """The words of each line of a file of labels: a label, or an image's file name and its label.

    ILSVRC's ground truth (its devkit, or the text file of it beside the devkit) comes out as WordNet ids.
    """
    try:
        if path.name.endswith(".tar.gz"):
            return [[wnid] for wnid in _devkit_labels(path)]
        lines = [re.split(r"[,\s]+", line) for line in read_lines(path)]
    except (OSError, UnicodeDecodeError, tarfile.TarError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the file of labels {path} cannot be read ({reason}): correct --labels") from error
    if "ground_truth" in path.name:
        devkit = path.parent / DEVKIT
        meta = path.parent / "meta.mat"
        if meta.exists():
            wnids = _wnids(meta.read_bytes(), meta)
        elif devkit.exists():
            wnids = _wnids(_devkit_file(devkit, "meta.mat"), devkit)
        else:
            raise UserError(
                f"{path} numbers the classes as the devkit's meta.mat says, which is not beside it: "
                f"put {DEVKIT} or its meta.mat there"
            )
        return [[_wnid(wnids, line[0], path)] for line in lines]
    return lines


def _devkit_labels(devkit: Path) -> list[str]:
    numbers = _devkit_file(devkit, "ILSVRC2012_validation_ground_truth.txt").decode().split()
    wnids = _wnids(_devkit_file(devkit, "meta.mat"), devkit)
    return [_wnid(wnids, number, devkit) for number in numbers]


def _devkit_file(devkit: Path, name: str) -> bytes:
    with tarfile.open(devkit) as tar:
        for member in tar:
            if member.name.endswith(f"/data/{name}"):
                file = tar.extractfile(member)
                assert file is not None
                return file.read()
    raise UserError(f"{devkit} holds no data/{name}: it is not ILSVRC2012's devkit; download it again")


def _wnids(meta: bytes, where: Path) -> dict[str, str]:
    """ILSVRC2012_ID -> WordNet id, from meta.mat."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError("reading ILSVRC2012's meta.mat needs scipy: pip install scipy") from error
    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        return {str(int(synset["ILSVRC2012_ID"])): str(synset["WNID"]) for synset in synsets}
    except Exception as error:  # scipy raises many kinds on a damaged file
        raise UserError(f"meta.mat of {where} cannot be read ({error}): download the devkit again") from error


def _wnid(wnids: dict[str, str], number: str, where: Path) -> str:
    if number not in wnids:
        raise UserError(f"{where} has the label {number}, which meta.mat does not know: download the devkit again")
    return wnids[number]
