"""Which shards a pattern names, and what the dataset.json beside them says."""

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError

from fastvit_engine.config.near import near_names
from fastvit_engine.data.shards.braces import expand_braces
from fastvit_engine.data.shards.image_files import has_image_suffix
from fastvit_engine.data.shards.splits import Splits, choose_files, split_of
from fastvit_engine.errors import UserError
from fastvit_engine.shown import public_url
from fastvit_engine.storage.http import HttpSource
from fastvit_engine.storage.source import AttemptFailed, Denied, Missing, Refused, one_line
from fastvit_engine.storage.stores import open_store
from fastvit_engine.text import read_lines

Split = Literal["train", "eval"]
INFO_NAME = "dataset.json"
UNFINISHED_NAME = "dataset.unfinished"  # a folder beside the shards until all of them are made
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_SOURCES = (".csv", ".tsv", ".jsonl", ".parquet")  # tables of images, which somebody may take for shards
_WEB_TIMEOUT = 10.0  # seconds without a byte


class SplitInfo(BaseModel):
    """The shards of one split in dataset.json."""

    model_config = ConfigDict(extra="forbid")

    samples: int
    shards: dict[str, int]  # file name -> number of samples


class TeacherInfo(BaseModel):
    """Where the labels are from, if a model has given them (`fastvit data label`)."""

    model_config = ConfigDict(extra="forbid")

    model: str  # as it was named
    weights: str  # their hash
    kind: Literal["soft", "hard"]  # probabilities beside the class, or the class alone
    held: float | None = None  # soft: share of the probability that the listed classes hold, mean over the images
    least_held: float | None = None  # and the smallest


class DatasetInfo(BaseModel):
    """Contents of dataset.json, which `fastvit data make` and `label` write when all shards are whole."""

    model_config = ConfigDict(extra="forbid")

    classes: list[str]
    source: str
    seed: int
    eval_fraction: float | None  # None: the source's own split
    samples_per_shard: int
    options: dict[str, Any] = {}  # what else the command was asked for
    teacher: TeacherInfo | None = None  # None: the labels are the source's
    duplicates: int = 0  # images of the source that were left out because they occur twice
    failed: int = 0  # those that could not be read or decoded, or have no label
    left_out: dict[str, int] = {}  # all that was not used, by reason, duplicates and failed images too
    train: SplitInfo
    eval: SplitInfo


def is_local(shard: str) -> bool:
    return not shard.startswith("pipe:") and "://" not in shard


def find_shards(pattern: str | None, split: Split, notes: list[str] | None = None) -> list[str]:
    """The sorted shards that data.train or data.eval names; see list_shards."""
    if not pattern:
        raise UserError(
            f"data.{split} is not set: set it to the {split} shards, "
            f'as a folder, a glob, or a brace pattern such as "shards/{split}-{{000000..000099}}.tar"'
        )
    return list_shards([pattern], split, named=f"data.{split}", notes=notes)


def list_shards(
    patterns: Iterable[str],
    split: Split | None = None,
    *,
    named: str = "the pattern",
    notes: list[str] | None = None,
) -> list[str]:
    """The sorted shards that the patterns name, each once.

    A pattern is a folder, a glob or a file, with braces or without, on this machine or in an object store (s3://, gs://,
    az://); a URL on a web server, with braces; or @FILE with a pattern on each line. A folder
    with a dataset.json gives the shards that it lists for `split`. Any other folder gives its tar files: those whose
    names say the split, or all if no name says one (see `splits`). What was chosen by names is added to `notes`.
    Raises UserError, in which `named` says what the pattern is, if one matches nothing, if a file does not exist, or if
    only some names in a folder say a split.
    """
    shards: set[str] = set()
    ask = _Request(split, named, [] if notes is None else notes)
    for given in patterns:
        from_list = given.startswith("@")
        for pattern in _read_list(given[1:], named) if from_list else [given]:
            try:
                found = _expand(pattern, ask)
            except (OSError, ValueError) as error:  # ValueError: of a name with a zero in it
                reason = getattr(error, "strerror", None) or one_line(error)
                raise UserError(f"{named} is {pattern[:500]!r}, which cannot be read ({reason}): correct it") from error
            if from_list:
                _check_no_command(found, given[1:], named)
            if not found:
                raise UserError(f"{named} is {pattern!r}, which {_why_nothing(pattern)}")
            _check_no_source(found, named)
            shards.update(found)
    if split == "train":
        ask.notes.extend(_about_several_splits(shards, named))
    return sorted(shards)


def _check_no_source(files: Iterable[str], named: str) -> None:
    """Raises UserError if a file is what shards are made of, by its suffix."""
    for file in files:
        if file.lower().endswith(_SOURCES):
            raise UserError(
                f"{named} names {file}, which is no shard: run `fastvit data make {file} --out data/new`, and name "
                "data/new instead"
            )


def _about_several_splits(shards: Iterable[str], named: str) -> list[str]:
    """A clause if patterns that somebody wrote match shards of several splits, which may be meant."""
    groups = Splits.of(sorted(shard.rpartition("/")[2] for shard in shards)).named()
    if len(groups) < 2:
        return []
    return [f"{named} matches {' and '.join(f'{len(group):,} named {part}' for part, group in groups.items())}"]


@dataclass(frozen=True)
class _Request:
    """What shards are wanted for."""

    split: Split | None
    named: str  # what the pattern is, for errors
    notes: list[str]  # receives what was chosen by names


def _read_list(path: str, named: str) -> list[str]:
    try:
        lines = read_lines(Path(path).expanduser())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UserError(f"{named} is the list {path}, which cannot be read ({reason}): correct it") from error
    patterns = [line for line in lines if not line.startswith("#")]
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


def _expand(pattern: str, ask: _Request) -> list[str]:
    if pattern.startswith("file://"):
        pattern = pattern.removeprefix("file://")
    if is_local(pattern):
        pattern = os.path.expanduser(pattern)
    if Path(pattern).is_dir():
        return _shards_of_folder(pattern, ask)
    try:
        parts = expand_braces(pattern)
    except ValueError as error:
        raise UserError(f"{ask.named} is {pattern[:500]!r}, whose braces cannot be expanded: {error}") from error
    return [shard for part in parts for shard in _expand_part(part, ask)]


def _expand_part(part: str, ask: _Request) -> list[str]:
    """The shards that a pattern without braces names."""
    if part.startswith("pipe:"):
        return [part]
    if not is_local(part):
        return _list_remote(part, ask)
    if glob.has_magic(part):
        return _as_paths(sorted(glob.glob(part)))
    if Path(part).is_dir():
        return _shards_of_folder(part, ask)
    if not Path(part).is_file():
        near = _near_path(part)
        hint = f"did you mean {near}?" if near else "copy it there or correct it"
        raise UserError(f"{ask.named} names the shard {part}, which does not exist: {hint}")
    return [part]


def _list_remote(url: str, ask: _Request) -> list[str]:
    """The shards that a URL without braces names: itself, or what is in a folder or matches a glob."""
    if url.startswith(("http://", "https://")):
        path = urlsplit(url).path
        if path.endswith("/") or "*" in path:
            raise UserError(
                f"{ask.named} is {url!r}, but a web server does not list its files: "
                "name them with braces, or in a file given as @FILE"
            )
        return [url]
    if url.endswith(SHARD_SUFFIXES) and not glob.has_magic(url):
        return [url]
    if glob.has_magic(url):
        return sorted(found for found in _listed(url, ask.named) if found.endswith(SHARD_SUFFIXES))
    return _choose(url.rstrip("/"), _names_of(url, ask.named), ask)


def _names_of(url: str, named: str) -> list[str]:
    """The names of what is in a folder of an object store; none if it does not exist."""
    return [found.rstrip("/").rpartition("/")[2] for found in _listed(url, named)]


def _listed(url: str, named: str) -> list[str]:
    """The URLs of what is in a folder of an object store, or matches a glob there; none if it does not exist."""
    store, key = open_store(url)
    root = url.rstrip("/").removesuffix(key)  # "s3://bucket/"
    try:
        keys = store.glob(key) if glob.has_magic(key) else [info.key for info in store.list_folder(key)]
    except Missing:
        return []
    except (AttemptFailed, Refused) as error:
        raise UserError(
            f"{named} is {url!r}, which cannot be listed ({one_line(error)}): check its name and your access to it"
        ) from error
    return [root + found for found in keys]


def _shards_of_folder(folder: str, ask: _Request) -> list[str]:
    return _choose(folder, os.listdir(folder), ask)


def _choose(folder: str, names: Iterable[str], ask: _Request) -> list[str]:
    """The shards of a folder, local or remote, that serve the split."""
    names = sorted(names)
    shards = [name for name in names if name.endswith(SHARD_SUFFIXES)]
    info = read_info(folder) if INFO_NAME in names else None
    if info is None and INFO_NAME in names:
        raise UserError(f"{public_url(folder)}/{INFO_NAME} cannot be read (access is denied): make it readable")
    if info is not None and ask.split is not None:
        shards = sorted((info.train if ask.split == "train" else info.eval).shards)
        if not shards and (info.train.shards or info.eval.shards):
            other = "evaluate" if ask.split == "train" else "train"
            raise UserError(f"{ask.named} is {folder}, which has images to {other} on only: name another folder")
    elif ask.split is not None and shards:
        if UNFINISHED_NAME in names:
            raise UserError(
                f"{ask.named} is {folder}, whose shards are not all made: run its `fastvit data make` again to the end"
            )
        choice = choose_files(shards, ask.split, folder, ask.named)
        shards = choice.names
        ask.notes.extend([choice.note] if choice.note else [])
    paths = [os.path.join(folder, name) for name in shards]
    return _as_paths(paths) if is_local(folder) else paths


def read_info(folder: Path | str) -> DatasetInfo | None:
    """dataset.json of a folder of shards, on this machine or in an object store; None if there is none.

    Raises UserError if it cannot be read or understood.
    """
    path = os.path.join(folder, INFO_NAME)
    try:
        content = Path(path).read_bytes() if is_local(path) else _read_remote(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): make it readable") from error
    return None if content is None else _parse_info(content, public_url(path))


def _parse_info(content: bytes, path: str) -> DatasetInfo:
    try:
        return DatasetInfo.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise UserError(
            f"{path} is not what `fastvit data make` writes ({where}: {problem['msg']}): remove it"
        ) from error


def _read_remote(url: str) -> bytes | None:
    """The content of a file on a server; None if it does not exist or, which may look alike, access is denied."""
    if url.startswith(("http://", "https://")):
        return _read_web(url)
    store, key = open_store(url)
    try:
        return store.read(key)
    except (Missing, Denied):
        return None
    except (AttemptFailed, Refused) as error:
        raise UserError(f"{public_url(url)} cannot be read ({one_line(error)}): check your access to it") from error


def _read_web(url: str) -> bytes | None:
    """The content of a file on a web server, None if it cannot be had at once: many serve nothing but the shards."""
    try:
        with HttpSource().open(url, 0, None, _WEB_TIMEOUT) as reply:
            content = b"".join(reply.chunks)
            return content if reply.size in (None, len(content)) else None
    except (AttemptFailed, Refused):
        return None


def fetch_beside(shards: Sequence[str], name: str) -> bytes | None:
    """The content of a file in the remote folder that holds the shards, None if there is none.

    None too for shards on this machine, in several folders, from pipes, or with a query, such as a signature.
    """
    folders = {shard.rpartition("/")[0] for shard in shards}
    folder = folders.pop()
    if folders or is_local(folder) or folder.startswith("pipe:") or "?" in folder or "?" in shards[0]:
        return None
    return _read_remote(f"{folder}/{name}")


def info_beside(shards: list[str]) -> DatasetInfo | None:
    """dataset.json of the folder that holds the first of `shards`, None if there is none; see `fetch_beside`."""
    if is_local(shards[0]):
        return read_info(Path(shards[0]).parent)
    content = fetch_beside(shards[:1], INFO_NAME)
    if content is None:
        return None
    try:
        return _parse_info(content, f"{public_url(shards[0].rpartition('/')[0])}/{INFO_NAME}")
    except UserError:
        if shards[0].startswith(("http://", "https://")):
            return None  # a web server may answer with a page
        raise


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
    return any(has_image_suffix(path.name) for pattern in patterns for path in folder.glob(pattern))


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
    missing: frozenset[str]  # shards that a dataset.json lists and that are not there, as far as a listing tells
    unlisted: list[str]  # names of shards that are there, and that the dataset.json does not list

    @property
    def class_names(self) -> list[str] | None:
        return self.info.classes if self.info else None


def shard_set(argument: str, split: Split | None = None) -> ShardSet:
    """A folder (the shards of `split` or all, by its dataset.json or else by their names), or what `list_shards` takes.

    Shards of a dataset.json may be missing, which is a finding. Raises UserError if nothing is named.
    """
    folder, names = _folder(argument)
    missing: frozenset[str] = frozenset()
    unlisted: list[str] = []
    splits: dict[str, Split | None] = {}
    if names is not None and INFO_NAME in names and (info := read_info(folder)) is not None:
        splits = {
            name: part
            for part in _splits(split)
            for name in sorted((info.train if part == "train" else info.eval).shards)
        }
        shards = [os.path.join(folder, name) for name in splits]
        shards = _as_paths(shards) if is_local(folder) else shards
        missing = frozenset(shard for shard in shards if shard.rpartition("/")[2] not in names)
        known = info.train.shards.keys() | info.eval.shards.keys()
        unlisted = sorted(name for name in names - known if name.endswith(SHARD_SUFFIXES))
    elif names is not None:
        info = None
        shards = _choose(folder, names, _Request(split, "SHARDS", []))
        splits = {shard: _split_by_name(shard) for shard in shards}
    else:
        shards = list_shards([argument], split, named="SHARDS")
        info = info_beside(shards) if shards else None
        splits = {shard: _split_by_name(shard) if info is None else _recorded_split(shard, info) for shard in shards}
    if not shards:
        raise UserError(f"SHARDS is {argument!r}, which {_why_nothing(argument)}")
    return ShardSet(shards, info, list(splits.values()), missing, unlisted)


def _folder(argument: str) -> tuple[str, set[str] | None]:
    """An argument as a folder, and the names of what is in it; None for what is no folder or cannot be listed."""
    if is_local(argument):
        path = Path(argument).expanduser()
        return str(path), set(os.listdir(path)) if path.is_dir() else None
    plain = not argument.startswith(("http://", "https://", "pipe:")) and not argument.endswith(SHARD_SUFFIXES)
    if plain and not glob.has_magic(argument) and expand_braces(argument) == [argument]:
        return argument.rstrip("/"), set(_names_of(argument, "SHARDS"))
    return argument, None


def _splits(split: Split | None) -> list[Split]:
    return ["train", "eval"] if split is None else [split]


def _split_by_name(shard: str) -> Split | None:
    part = split_of(shard)
    return None if part is None else "train" if part == "train" else "eval"


def _recorded_split(shard: str, info: DatasetInfo) -> Split | None:
    name = shard.rpartition("/")[2]
    return "train" if name in info.train.shards else "eval" if name in info.eval.shards else None


def about_teacher(info: DatasetInfo | None, named: str) -> list[str]:
    """A clause if labels that something is measured by are a model's."""
    if info is None or info.teacher is None:
        return []
    return [f"the labels of {named} are what {info.teacher.model} takes the images for, not the truth"]


def check_same_classes(one: DatasetInfo | None, other: DatasetInfo | None, named: str, other_named: str) -> None:
    """Raises UserError if two data sets say that their classes are not the same."""
    if one is None or other is None or one.classes == other.classes:
        return
    ours, theirs = one.classes, other.classes
    if len(ours) != len(theirs):
        raise UserError(
            f"{named} has {len(ours):,} classes and {other_named} {len(theirs):,}: give shards of the same classes, in "
            "the same order"
        )
    number = next(n for n, names in enumerate(zip(ours, theirs, strict=True)) if names[0] != names[1])
    raise UserError(
        f"class {number} is '{ours[number]}' in {named} and '{theirs[number]}' in {other_named}: give shards of the "
        "same classes, in the same order"
    )
