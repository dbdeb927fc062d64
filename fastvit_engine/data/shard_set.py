"""The shards that an argument of `fastvit data` names."""

from dataclasses import dataclass
from pathlib import Path

from fastvit_engine.data.shards import SHARD_SUFFIXES, DatasetInfo, Split, is_local, list_shards, read_info
from fastvit_engine.errors import UserError


@dataclass(frozen=True)
class ShardSet:
    shards: list[str]  # paths or URLs, sorted; those of a dataset.json may be missing
    info: DatasetInfo | None  # dataset.json of their folder
    splits: list[Split | None]  # of each shard

    @property
    def class_names(self) -> list[str] | None:
        return self.info.classes if self.info else None


def shard_set(argument: str, split: Split | None = None) -> ShardSet:
    """A folder (the shards of its dataset.json, of `split` or both; else all its tars), or what `list_shards` takes.

    Shards of a dataset.json may be missing, which is a finding. UserError where nothing is named.
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
        shards = [str(folder / name) for name in splits]
    else:
        shards = list_shards([argument], named="SHARDS")
        info = read_info(Path(shards[0]).parent) if shards and is_local(shards[0]) else None
        splits = {Path(shard).name: _split_of(Path(shard).name, info) for shard in shards}
    if not shards:
        raise UserError(f"SHARDS is {argument!r}, which matches no shards: correct it, or make the shards first")
    return ShardSet(shards, info, list(splits.values()))


def _splits(split: Split | None) -> list[Split]:
    return ["train", "eval"] if split is None else [split]


def _split_of(name: str, info: DatasetInfo | None) -> Split | None:
    if info is None:
        return None
    return "train" if name in info.train.shards else "eval" if name in info.eval.shards else None
