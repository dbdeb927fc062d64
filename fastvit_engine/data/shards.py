"""Which shards a pattern names, and what the dataset.json beside them says."""

import glob
import os
from pathlib import Path
from typing import Literal

from braceexpand import braceexpand
from pydantic import BaseModel, ConfigDict, ValidationError

from fastvit_engine.errors import UserError

Split = Literal["train", "eval"]
INFO_NAME = "dataset.json"
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")


class SplitInfo(BaseModel):
    model_config = ConfigDict(extra="forbid")

    samples: int
    shards: dict[str, int]  # file name -> number of samples


class DatasetInfo(BaseModel):
    """Contents of dataset.json, which `fastvit data make` writes when all shards are whole."""

    model_config = ConfigDict(extra="forbid")

    classes: list[str]
    source: str
    seed: int
    eval_fraction: float
    samples_per_shard: int
    train: SplitInfo
    eval: SplitInfo


def is_local(shard: str) -> bool:
    return not shard.startswith("pipe:") and "://" not in shard


def find_shards(pattern: str | None, split: Split | None) -> list[str]:
    """The sorted shards that `pattern`, the value of data.`split`, names: a folder, a glob, a brace pattern, or URLs.

    A folder with a dataset.json gives the shards that it lists for `split`; any other folder, or a `split` of None,
    gives all its tar files.
    UserError where nothing matches or a named file does not exist.
    """
    if not pattern:
        raise UserError(
            f"data.{split} is not set: set it to the {split} shards, "
            f'as a folder, a glob, or a brace pattern such as "shards/{split}-{{000000..000099}}.tar"'
        )
    name = f"data.{split}" if split else "SHARDS"
    if is_local(pattern):
        pattern = os.path.expanduser(pattern)
    if Path(pattern).is_dir():
        shards = _shards_of_folder(Path(pattern), split)
    else:
        try:
            parts = list(braceexpand(pattern))
        except ValueError as error:
            raise UserError(f"{name} is {pattern!r}, whose braces do not match: {error}") from error
        shards = [shard for part in parts for shard in (sorted(glob.glob(part)) if _is_glob(part) else [part])]
    if not shards:
        raise UserError(f"{name} is {pattern!r}, which matches no shards: correct it, or make the shards first")
    for shard in shards:
        if is_local(shard) and not Path(shard).is_file():
            raise UserError(f"{name} names the shard {shard}, which does not exist: copy it there or correct it")
    return sorted(set(shards))


def read_info(folder: Path) -> DatasetInfo | None:
    """dataset.json of a folder of shards, None where there is none; UserError where it cannot be understood."""
    path = folder / INFO_NAME
    try:
        return DatasetInfo.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): make it readable") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise UserError(
            f"{path} is not what `fastvit data make` writes ({where}: {problem['msg']}): remove it"
        ) from error


def info_beside(shards: list[str]) -> DatasetInfo | None:
    """dataset.json of the folder that holds the first of `shards`."""
    return read_info(Path(shards[0]).parent) if is_local(shards[0]) else None


def _is_glob(part: str) -> bool:
    return is_local(part) and glob.has_magic(part)


def _shards_of_folder(folder: Path, split: Split | None) -> list[str]:
    info = read_info(folder) if split else None
    if info is not None:
        names = sorted((info.train if split == "train" else info.eval).shards)
    else:
        names = sorted(path.name for path in folder.iterdir() if path.name.endswith(SHARD_SUFFIXES))
    return [str(folder / name) for name in names]
