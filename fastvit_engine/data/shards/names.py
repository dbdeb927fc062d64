"""Which shards a pattern names, and what the dataset.json beside them says."""

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from braceexpand import braceexpand
from fsspec.core import url_to_fs
from pydantic import BaseModel, ConfigDict, ValidationError

from fastvit_engine.config.near import near_names
from fastvit_engine.errors import UserError
from fastvit_engine.storage.object_store import one_line, require_package

Split = Literal["train", "eval"]
INFO_NAME = "dataset.json"
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class SplitInfo(BaseModel):
    """The shards of one split in dataset.json."""

    model_config = ConfigDict(extra="forbid")

    samples: int
    shards: dict[str, int]  # file name -> number of samples


class DatasetInfo(BaseModel):
    """Contents of dataset.json, which `fastvit data make` writes when all shards are whole."""

    model_config = ConfigDict(extra="forbid")

    classes: list[str]
    source: str
    seed: int
    eval_fraction: float | None  # None: the source's own split
    samples_per_shard: int
    options: dict[str, Any] = {}  # what else `fastvit data make` was asked for
    duplicates: int = 0  # images of the source that were left out because they occur twice
    failed: int = 0  # those that could not be fetched or decoded
    train: SplitInfo
    eval: SplitInfo


def is_local(shard: str) -> bool:
    return not shard.startswith("pipe:") and "://" not in shard


def find_shards(pattern: str | None, split: Split) -> list[str]:
    """The sorted shards that data.train or data.eval names; see list_shards."""
    if not pattern:
        raise UserError(
            f"data.{split} is not set: set it to the {split} shards, "
            f'as a folder, a glob, or a brace pattern such as "shards/{split}-{{000000..000099}}.tar"'
        )
    return list_shards([pattern], split, named=f"data.{split}")


def list_shards(patterns: Iterable[str], split: Split | None = None, *, named: str = "the pattern") -> list[str]:
    """The sorted shards that the patterns name, each once.

    A pattern is a folder, a glob or a file, with braces or without, on this machine or in an object store (s3://, gs://
    and others that fsspec lists); a URL on a web server, with braces; or @FILE with a pattern on each line. A folder
    with a dataset.json gives the shards that it lists for `split`; any other folder gives all its tar files.
    Raises UserError, in which `named` says what the pattern is, if one matches nothing or a file does not exist.
    """
    shards: set[str] = set()
    for given in patterns:
        from_list = given.startswith("@")
        for pattern in _read_list(given[1:], named) if from_list else [given]:
            found = _expand(pattern, split, named)
            if from_list:
                _check_no_command(found, given[1:], named)
            if not found:
                raise UserError(f"{named} is {pattern!r}, which {_why_nothing(pattern)}")
            shards.update(found)
    return sorted(shards)


def _read_list(path: str, named: str) -> list[str]:
    try:
        lines = [line.strip() for line in Path(path).expanduser().read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UserError(f"{named} is the list {path}, which cannot be read ({reason}): correct it") from error
    patterns = [line for line in lines if line and not line.startswith("#")]
    if not patterns:
        raise UserError(f"{named} is the list {path}, which names no shards: write one path, pattern or URL per line")
    return patterns


def _check_no_command(shards: list[str], path: str, named: str) -> None:
    """Raises UserError for a pipe that a list file names: whoever writes data must not choose what is run."""
    for shard in shards:
        if shard.startswith("pipe:"):
            raise UserError(
                f"{named} is the list {path}, which names the command {shard!r}: a command runs only if it is given "
                "on the command line or in a recipe; give it there, or name a path or a URL in the list"
            )


def _as_paths(found: Iterable[str]) -> list[str]:
    """Names of files; one that begins like a command gets "./" in front, so that nothing runs it."""
    return [name if is_local(name) else os.path.join(".", name) for name in found]


def _expand(pattern: str, split: Split | None, named: str) -> list[str]:
    if pattern.startswith("file://"):
        pattern = pattern.removeprefix("file://")
    if is_local(pattern):
        pattern = os.path.expanduser(pattern)
    if Path(pattern).is_dir():
        return _shards_of_folder(Path(pattern), split)
    try:
        parts = list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"{named} is {pattern!r}, whose braces do not match: {error}") from error
    return [shard for part in parts for shard in _expand_part(part, split, named)]


def _expand_part(part: str, split: Split | None, named: str) -> list[str]:
    """The shards that a pattern without braces names."""
    if part.startswith("pipe:"):
        return [part]
    if not is_local(part):
        return _list_remote(part, named)
    if glob.has_magic(part):
        return _as_paths(sorted(glob.glob(part)))
    if Path(part).is_dir():
        return _shards_of_folder(Path(part), split)
    if not Path(part).is_file():
        near = _near_path(part)
        hint = f"did you mean {near}?" if near else "copy it there or correct it"
        raise UserError(f"{named} names the shard {part}, which does not exist: {hint}")
    return [part]


def _list_remote(url: str, named: str) -> list[str]:
    """The shards that a URL without braces names: itself, or what fsspec finds in a folder or by a glob."""
    if url.startswith(("http://", "https://")):
        path = urlsplit(url).path
        if path.endswith("/") or "*" in path:
            raise UserError(
                f"{named} is {url!r}, but a web server does not list its files: "
                "name them with braces, or in a file given as @FILE"
            )
        return [url]
    if url.endswith(SHARD_SUFFIXES) and not glob.has_magic(url):
        return [url]
    require_package(url)
    try:
        fs, path = url_to_fs(url.rstrip("/"))
        fs.invalidate_cache()
        names = fs.glob(path) if glob.has_magic(path) else fs.ls(path, detail=False)
    except FileNotFoundError:
        return []
    except Exception as error:  # each package has its own classes
        raise UserError(
            f"{named} is {url!r}, which cannot be listed ({one_line(error)}): check its name and your access to it"
        ) from error
    root = url.rstrip("/").removesuffix(path)  # "s3://"
    return sorted(root + name for name in names if name.endswith(SHARD_SUFFIXES))


def read_info(folder: Path) -> DatasetInfo | None:
    """dataset.json of a folder of shards, None if there is none. Raises UserError if it cannot be understood."""
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


def _shards_of_folder(folder: Path, split: Split | None) -> list[str]:
    info = read_info(folder)
    if info is not None and split is not None:
        names = sorted((info.train if split == "train" else info.eval).shards)
    else:
        names = sorted(path.name for path in folder.iterdir() if path.name.endswith(SHARD_SUFFIXES))
    return _as_paths(str(folder / name) for name in names)


def _why_nothing(pattern: str) -> str:
    """What a pattern names instead of shards, and what to do: the end of a sentence."""
    folder = Path(pattern).expanduser()
    if is_local(pattern) and folder.is_dir() and _holds_images(folder):
        out = Path("data") / folder.resolve().name
        return f"holds images, not shards: run `fastvit data make {pattern} --out {out}`, and name {out} instead"
    near = _near_path(pattern) if is_local(pattern) else None
    return f"matches no shards: {f'did you mean {near}?' if near else 'correct it, or make the shards first'}"


def _holds_images(folder: Path) -> bool:
    """Whether there is an image in a folder, in one of its sub-folders, or in one of theirs (train/cat/1.jpg)."""
    patterns = ("*", "*/*", "*/*/*")
    return any(path.name.lower().endswith(IMAGE_SUFFIXES) for pattern in patterns for path in folder.glob(pattern))


def _near_path(path: str) -> Path | None:
    """A similar name beside the first folder of a path that does not exist; None for a shard: others are numbered."""
    whole = Path(path).expanduser()
    missing = next((part for part in [whole, *whole.parents][::-1] if not part.exists()), None)
    if missing is None or glob.has_magic(missing.name) or missing.name.endswith(SHARD_SUFFIXES):
        return None
    if not missing.parent.is_dir():
        return None
    near = near_names(missing.name, sorted(entry.name for entry in missing.parent.iterdir()))
    return missing.parent / near[0] if near else None


@dataclass(frozen=True)
class ShardSet:
    """The shards that an argument names, and what dataset.json says of them."""

    shards: list[str]  # paths or URLs, sorted; those of a dataset.json may be missing
    info: DatasetInfo | None  # dataset.json of their folder
    splits: list[Split | None]  # of each shard

    @property
    def class_names(self) -> list[str] | None:
        return self.info.classes if self.info else None


def shard_set(argument: str, split: Split | None = None) -> ShardSet:
    """A folder (the shards of its dataset.json, of `split` or both; else all its tars), or what `list_shards` takes.

    Shards of a dataset.json may be missing, which is a finding. Raises UserError if nothing is named.
    """
    folder = Path(argument).expanduser()
    if is_local(argument) and folder.is_dir():
        info = read_info(folder)
        names = {name: None for name in sorted(path.name for path in folder.iterdir()) if name.endswith(SHARD_SUFFIXES)}
        splits: dict[str, Split | None] = dict(names)
        if info is not None:
            splits = {
                name: part
                for part in _splits(split)
                for name in sorted((info.train if part == "train" else info.eval).shards)
            }
        shards = _as_paths(str(folder / name) for name in splits)
    else:
        shards = list_shards([argument], named="SHARDS")
        info = read_info(Path(shards[0]).parent) if shards and is_local(shards[0]) else None
        splits = {Path(shard).name: _split_of(Path(shard).name, info) for shard in shards}
    if not shards:
        raise UserError(f"SHARDS is {argument!r}, which {_why_nothing(argument)}")
    return ShardSet(shards, info, list(splits.values()))


def _splits(split: Split | None) -> list[Split]:
    return ["train", "eval"] if split is None else [split]


def _split_of(name: str, info: DatasetInfo | None) -> Split | None:
    if info is None:
        return None
    return "train" if name in info.train.shards else "eval" if name in info.eval.shards else None
