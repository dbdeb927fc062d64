"""Finds and checks the data of a run before it starts, and refuses everything that can be refused then."""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fastvit_engine.config import Config, DataSource, DinoConfig, MocoConfig
from fastvit_engine.data.pixels.decode import decode_image
from fastvit_engine.data.shards.archive import read_shard, stamp_of_local
from fastvit_engine.data.shards.index import (
    INDEX_NAME,
    INDEX_SUFFIX,
    Index,
    index_command,
    is_index,
    open_index,
    write_index,
)
from fastvit_engine.data.shards.names import (
    DatasetInfo,
    Split,
    about_teacher,
    check_same_classes,
    fetch_beside,
    find_shards,
    info_beside,
    is_local,
    list_shards,
)
from fastvit_engine.data.shards.remote_path import any_path
from fastvit_engine.data.shards.sample import Sample, parse_sample
from fastvit_engine.data.shards.soft_labels import SOFT_MEMBER
from fastvit_engine.data.shards.splits import Splits, choose_files
from fastvit_engine.data.shards.tar import TarError
from fastvit_engine.data.shards.usable import (
    PLAUSIBLE_CLASSES,
    SampleKeys,
    Unusable,
    name_of,
    read_image,
    read_labels,
    read_soft_label,
)
from fastvit_engine.data.stream.indexed import IndexedData, IndexedShards, TrainSource, open_storage
from fastvit_engine.data.stream.iterable import IterableData
from fastvit_engine.data.stream.order import CYCLE, choose_lanes, share_slots
from fastvit_engine.data.stream.overlap import check_indexes_apart, check_streams_apart
from fastvit_engine.data.stream.source import EvaluationData, TrainingData
from fastvit_engine.data.stream.streams import StreamData, StreamedShards, plan_streams
from fastvit_engine.data.stream.subset import subsets_of_sources
from fastvit_engine.errors import UserError
from fastvit_engine.files import atomic_write
from fastvit_engine.observe.units import counted
from fastvit_engine.shown import public_url, say
from fastvit_engine.storage import ShardStorage

_LOOKED_AT = 8  # samples whose images are decoded before a run starts


def prepare_data(
    config: Config,
    *,
    world_size: int,
    index_folder: Path,
    recorded: Mapping[str, Any] | None = None,
    given: IterableData | None = None,
    scratch: Path | None = None,
) -> TrainingData:
    """Finds or makes the indexes, fixes the number of lanes, and checks that the data can serve this configuration.

    An index that is missing beside the shards is made there, or in `index_folder` if that is read-only; with `scratch`,
    in that folder only. `recorded` is the fingerprint of the run's data if it already has one: its number of lanes
    holds unless data.lanes is set. `given` takes the place of data.train. Raises UserError, naming the shard, for
    whatever can be known now: bad patterns, damaged archives, labels that are missing or out of range, images that
    nothing decodes.
    """
    folders = _Folders(index_folder, scratch)
    if given is not None:
        return _prepare_iterable(config, given, folders)
    if config.data.order == "stream":
        return _prepare_streams(config, world_size)
    if not config.data.sources:
        find_shards(None, "train")  # says how to set it
    notes: list[str] = []
    indexes = [
        _find_index(source.shards, source.index or config.data.index, "train", config, folders, notes)
        for source in config.data.sources
    ]
    held_out = _find_eval(config, folders, notes)
    check_indexes_apart(indexes, held_out, config.data)
    read = _samples_read(indexes, config)
    if recorded is not None and recorded.get("subset") != (sum(read) if config.data.subset else None):
        recorded = None  # another run, which is refused for that
    sources = tuple(
        _prepare_source(config, number, source, indexes[number], read[number], recorded)
        for number, source in enumerate(config.data.sources)
    )
    for source, slots in zip(config.data.sources, share_slots([s.weight for s in sources]), strict=True):
        if slots == 0:
            raise UserError(
                f"the weight {source.weight:g} of {source.shards} in data.train is less than a {CYCLE}th of all: "
                "raise it, or leave the source out"
            )
    infos = [info_beside(list(source.data.shards)) for source in sources]
    soft = [
        _has_soft_labels(info, _read_rows(index, open_storage([index], config.data), 0, [0]))
        for index, info in zip(indexes, infos, strict=True)
    ]
    _check_soft_labels(soft, [source.shards for source in config.data.sources], infos, config)
    info = infos[0]
    notes += _about_eval(held_out.shards if held_out else (), config)
    return IndexedData(
        train=sources,
        eval=_prepare_eval(config, held_out),
        samples_per_epoch=sum(read) if config.data.subset else config.data.train_samples or sum(read),
        class_names=info.classes if info else None,
        notes=tuple(notes),
        subset_of=sum(index.samples for index in indexes) if config.data.subset else None,
    )


def _samples_read(indexes: Sequence[Index], config: Config) -> list[int]:
    """The samples of each source that training reads. Raises UserError if it is not clear which data.subset means."""
    samples, declared = [index.samples for index in indexes], config.data.train_samples
    if config.data.subset is not None and declared not in (None, sum(samples)):
        raise UserError(
            f"data.train_samples is {declared:,}, and data.train has {counted(sum(samples), 'sample')}, so data.subset "
            "could be of either: set data.train_samples=null, and an epoch is the subset of what is there"
        )
    subsets = subsets_of_sources(samples, config.data, config.seed)
    return samples if subsets is None else [len(subset) for subset in subsets]


@dataclass(frozen=True)
class _Folders:
    """Where indexes lie that are not beside their shards; with `scratch`, new ones and copies are made there only."""

    run: Path
    scratch: Path | None

    @property
    def copies(self) -> Path:
        """For copies of remote indexes."""
        return self.scratch or self.run


def _find_eval(config: Config, folders: _Folders, notes: list[str]) -> Index | None:
    if not config.data.eval:
        return None
    return _find_index(config.data.eval, config.data.index, "eval", config, folders, notes)


def _prepare_eval(config: Config, index: Index | None) -> IndexedShards | None:
    if index is None:
        return None
    _check_samples(index, "data.eval", config)
    return IndexedShards.of(index)


def _prepare_iterable(config: Config, given: IterableData, folders: _Folders) -> IterableData:
    if config.data.train:
        raise UserError("data.train is set, and training data is given as an iterable too: leave one of them out")
    if isinstance(config.pretraining, DinoConfig | MocoConfig):
        raise UserError(
            f"train.objective = {config.train.objective} crops several views of each image, and an iterable gives "
            "images that are cropped: train on shards"
        )
    if config.packing.max_patches is not None:
        raise UserError(
            f"packing.max_patches is {config.packing.max_patches}, and training data is given as an iterable, whose "
            "images have been cropped to squares: set it to null, or train on shards"
        )
    if config.data.subset is not None:
        raise UserError(
            f"data.subset is {config.data.subset}, and training data is given as an iterable, whose samples nobody has "
            "numbered: set it to null and let the iterable choose, or train on shards"
        )
    if config.data.soft_labels:
        raise UserError(
            "data.soft_labels is true, and training data is given as an iterable, whose labels are class indices: set "
            "it to null, or train on shards"
        )
    streams = config.data.order == "stream"
    evaluation = eval_streams(config) if streams else _prepare_eval(config, _find_eval(config, folders, []))
    info = info_beside(list(evaluation.shards)) if evaluation else None
    return given.with_evaluation(config, evaluation, info.classes if info else None)


def _prepare_source(
    config: Config, number: int, source: DataSource, index: Index, samples: int, recorded: Mapping[str, Any] | None
) -> TrainSource:
    """samples: of the source that training reads."""
    _check_samples(index, "data.train", config)
    known = (recorded or {}).get("sources", [])
    lanes = config.data.lanes or (known[number]["lanes"] if number < len(known) else choose_lanes(samples))
    if lanes > samples:
        holds = "holds" if config.data.subset is None else "has, in data.subset,"
        raise UserError(
            f"data.lanes is {lanes} and {source.shards} {holds} {samples} samples: lower it, or leave it out"
        )
    return TrainSource(IndexedShards.of(index), source.weight, samples, lanes)


# ---- finding the index


def _find_index(
    pattern: str, named: str | None, split: Split, config: Config, folders: _Folders, notes: list[str]
) -> Index:
    """The index of the shards that `pattern` names, in their sorted order; adds to `notes` as `find_shards` does."""
    if pattern.endswith(INDEX_SUFFIX):
        index = open_index(any_path(pattern), folders.copies, label_key=config.data.label_key)
        return _of_split(index, split, notes, f"data.{split}")
    shards = find_shards(pattern, split, notes)
    if named is not None:
        index = open_index(any_path(named), folders.copies, label_key=config.data.label_key)
        if split == "train" or None not in index.find(shards):  # which need not hold the evaluation shards
            return _unchanged_in_size(index.select(shards))
    beside = _remote_index(shards, config.data.label_key, folders.copies)
    if beside is not None:
        return beside
    for shard in shards:
        if not is_local(shard):
            use_it = "set data.index to it" if split == "train" else "set data.eval to it"
            raise UserError(
                f"data.{split} names the shard {shard}, which is not local: make an index of the shards with "
                f"`{index_command('FILE.index', config.data.label_key)}` and {use_it}, or set data.order to stream"
            )
    return _local_index(shards, split, config, folders)


def index_at_hand(shards: Sequence[str], config: Config, copies: Path) -> Index | None:
    """The index that data.index names or that lies beside `shards`; None if there is none that a run could use.

    A remote one is copied into the folder `copies`. Raises UserError if that of data.index cannot be used.
    """
    label_key = config.data.label_key
    if config.data.index is not None:
        index = open_index(any_path(config.data.index), copies, label_key=label_key)
        return _unchanged_in_size(index.select(shards))
    folders = {os.path.dirname(shard) for shard in shards}
    if not all(map(is_local, shards)):
        return _remote_index(shards, label_key, copies)
    known = _known_index(Path(folders.pop()) / INDEX_NAME) if len(folders) == 1 else None
    fits = known is not None and known.label_key == label_key and _describes(known, shards)
    return known.select(shards) if known is not None and fits else None


def _local_index(shards: Sequence[str], split: Split, config: Config, folders: _Folders) -> Index:
    """The index beside shards of this machine or in the run folder, which is made if it is missing."""
    beside = {os.path.dirname(shard) for shard in shards}
    paths = [folders.run / f"{split}{INDEX_SUFFIX}"]
    if len(beside) == 1:
        paths.insert(0, Path(beside.pop()) / INDEX_NAME)
    for path in paths:
        known = _known_index(path)
        if known is not None and known.label_key == config.data.label_key and _describes(known, shards):
            return known.select(shards)
    if folders.scratch is not None:
        return _make_index(folders.scratch / f"{split}{INDEX_SUFFIX}", shards, config.data.label_key)
    path = next((path for path in paths[:-1] if _may_write(path, config.data.label_key)), paths[-1])
    return _make_index(path, shards, config.data.label_key)


def _of_split(index: Index, split: Split, notes: list[str], named: str) -> Index:
    """The index of the shards of the split, by their names; of all if these do not say two splits or more."""
    splits = Splits.of(index.shards)
    wanted = splits.train if split == "train" else splits.val or splits.test
    if splits.unnamed or not wanted or len(splits.named()) < 2:
        return index
    choice = choose_files(index.shards, split, index.where, named)
    notes.append(choice.note)
    return index.select(choice.names)


def _remote_index(shards: Sequence[str], label_key: str, folder: Path) -> Index | None:
    """The index beside shards on a server, as `fastvit data make` writes it, copied into `folder`."""
    content = fetch_beside(shards, INDEX_NAME)
    if content is None or not is_index(content):
        return None
    path = folder / f"remote-{blake2b(content, digest_size=8).hexdigest()}{INDEX_SUFFIX}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, content)
    index = _known_index(path)
    if index is None or index.label_key != label_key or None in index.find(shards):
        return None
    beside = shards[0].rpartition("/")[0] + "/" + INDEX_NAME
    return replace(index, where=public_url(beside)).select(shards)


def _unchanged_in_size(index: Index) -> Index:
    for shard, size in zip(index.shards, index.sizes, strict=True):
        if is_local(shard) and os.stat(shard).st_size != size:
            raise UserError(
                f"shard {shard} has changed since the index {index.where} was made: make it again with "
                f"`{index.command()}`"
            )
    return index


def _make_index(path: Path, shards: Sequence[str], label_key: str) -> Index:
    """An index of these shards, and of the unchanged others that the one before has; returned for these alone."""
    before = _known_index(path)
    others = [] if before is None else [s for n, s in enumerate(before.shards) if _is_unchanged(before, n)]
    everything = {os.path.abspath(shard): shard for shard in [*others, *shards]}

    def progress(line: str) -> None:
        say(f"indexing {Path(shards[0]).parent}: {line}", file=sys.stderr)

    ordered = [everything[name] for name in sorted(everything)]
    return write_index(ordered, path, label_key=label_key, progress=progress).select(shards)


def _known_index(path: Path) -> Index | None:
    """The index at `path` if it can be used; it can always be made again."""
    try:
        return open_index(path)
    except UserError:
        return None


def _describes(index: Index, shards: Sequence[str]) -> bool:
    numbers = index.find(shards)
    return all(number is not None and _is_unchanged(index, number) for number in numbers)


def _is_unchanged(index: Index, number: int) -> bool:
    try:
        return stamp_of_local(index.shards[number]) == (index.sizes[number], index.stamps[number])
    except OSError:
        return False


def _may_write(path: Path, label_key: str) -> bool:
    before = _known_index(path)
    return os.access(path.parent, os.W_OK) and (before is None or before.label_key == label_key)


# ---- few-shot evaluation


@dataclass(frozen=True)
class FewShotData:
    """What evaluate.fewshot reads."""

    config: Config  # with which the images are read: one label each, of whatever classes
    train: EvaluationData
    eval: EvaluationData


def prepare_few_shot(config: Config, index_folder: Path, scratch: Path | None = None) -> FewShotData | None:
    """Finds the shards of evaluate.fewshot, None if they are not set; an index that is missing is made, if it can be.

    index_folder, scratch: as `prepare_data` takes them.
    Raises UserError, naming the shard, for whatever can be known now.
    """
    few_shot = config.evaluate.fewshot
    if few_shot.train is None or few_shot.eval is None:
        return None
    model = config.model.model_copy(update={"num_classes": PLAUSIBLE_CLASSES})
    data = config.data.model_copy(update={"max_labels": 1})
    reading = config.model_copy(update={"model": model, "data": data})
    folders = _Folders(index_folder, scratch)
    train = _evaluation_shards(few_shot.train, "train", reading, "evaluate.fewshot.train", folders)
    evaluation = _evaluation_shards(few_shot.eval, "eval", reading, "evaluate.fewshot.eval", folders)
    one, other = info_beside(list(train.shards)), info_beside(list(evaluation.shards))
    check_same_classes(one, other, "evaluate.fewshot.train", "evaluate.fewshot.eval")
    return FewShotData(reading, train, evaluation)


def _evaluation_shards(
    pattern: str, split: Split, config: Config, named: str, folders: _Folders
) -> IndexedShards | StreamedShards:
    """Shards by position, of which each process reads its share only; or else from beginning to end."""
    notes: list[str] = []
    if config.data.order == "stream":
        return streamed_shards(pattern, split, config, named=named)
    if pattern.endswith(INDEX_SUFFIX):
        index = open_index(any_path(pattern), folders.copies, label_key=config.data.label_key)
        index = _of_split(index, split, notes, named)
    else:
        shards = list_shards([pattern], split, named=named, notes=notes)
        beside = _remote_index(shards, config.data.label_key, folders.copies)
        if beside is None and not all(is_local(shard) and shard.endswith(".tar") for shard in shards):
            return streamed_shards(pattern, split, config, named=named)
        index = beside or _local_index(shards, split, config, folders)
    _check_samples(index, named, config)
    return IndexedShards.of(index)


# ---- looking at the samples


def _has_soft_labels(info: DatasetInfo | None, samples: Iterable[Sample]) -> bool:
    """Whether dataset.json says that shards have soft labels; if it says nothing, whether some samples have any."""
    if info is not None and info.teacher is not None:
        return info.teacher.kind == "soft"
    return any(SOFT_MEMBER in sample for sample in samples)


def _check_soft_labels(
    soft: Sequence[bool], sources: Sequence[str], infos: Sequence[DatasetInfo | None], config: Config
) -> None:
    """Raises UserError if it is not clear which labels of the sources are learned, or they number other classes.

    soft: whether each source has soft labels.
    """
    if config.model.num_classes == 0:  # no labels are read
        return
    where = next((source for source, has in zip(sources, soft, strict=True) if has), None)
    if where is None:
        if config.data.soft_labels:
            raise UserError(
                f"data.soft_labels is true, and {' and '.join(sources)} of data.train has none: write some with "
                "`fastvit data label MODEL --data SHARDS --out FOLDER`, or set it to null"
            )
        return
    if config.data.soft_labels is None:
        raise UserError(
            f"{where} of data.train has soft labels beside its classes: set data.soft_labels=true to learn them, or "
            "data.soft_labels=false to learn the most probable classes alone"
        )
    for source, info in zip(sources[1:], infos[1:], strict=True):
        check_same_classes(infos[0], info, f"{sources[0]} of data.train", source)


def _about_eval(shards: Sequence[str], config: Config) -> list[str]:
    """A clause if data.eval has a teacher's labels."""
    return about_teacher(info_beside(list(shards)), "data.eval") if shards and config.model.num_classes else []


def _check_samples(index: Index, named: str, config: Config) -> None:
    _check_classes(index.shards, named, config)
    storage = open_storage([index], config.data)
    keys = SampleKeys.of(config.data)
    if config.model.num_classes and index.label_key == config.data.label_key:
        unlabelled = np.flatnonzero(index.unlabelled).tolist()
        for shard in [*unlabelled, *index.shards_with_labels_outside(config.model.num_classes)][:1]:
            for sample in _read_rows(index, storage, shard, range(index.counts[shard])):
                _check_labels(sample, keys, config)
    looked_at = np.linspace(0, index.samples - 1, min(index.samples, _LOOKED_AT)).astype(np.int64)
    ends = np.cumsum(index.counts)

    def samples() -> Iterator[Sample]:
        for number in looked_at:
            shard = int(np.searchsorted(ends, number, side="right"))
            yield from _read_rows(index, storage, shard, [int(number - (ends[shard] - index.counts[shard]))])

    _check_some(samples(), named, config)


def _check_some(samples: Iterable[Sample], named: str, config: Config) -> None:
    """Raises UserError for labels that are not usable, and if no image is."""
    keys = SampleKeys.of(config.data)
    unusable = []
    for sample in samples:
        _check_labels(sample, keys, config)
        try:
            read_image(sample, keys, partial(decode_image, max_pixels=keys.max_pixels))
            return
        except Unusable as problem:
            unusable.append(f"{name_of(sample)} {problem}")
            remedy = problem.remedy
    if unusable:
        others = f", and {len(unusable) - 1} others of {named} are no better" if len(unusable) > 1 else ""
        raise UserError(f"{unusable[0]}{others}: {remedy}")


def _check_labels(sample: Sample, keys: SampleKeys, config: Config) -> None:
    try:
        read_labels(sample, keys, config.model.num_classes)
        if config.data.soft_labels:
            read_soft_label(sample, config.model.num_classes)
    except Unusable as problem:
        raise UserError(f"{name_of(sample)} {problem}: {problem.remedy}") from problem


def _read_rows(index: Index, storage: ShardStorage, shard: int, rows: Sequence[int]) -> Iterator[Sample]:
    offsets, lengths = index.extents(np.full(len(rows), shard), np.asarray(rows, dtype=np.int64))
    for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True):
        try:
            yield parse_sample(storage.read(shard, offset, length), index.shards[shard])
        except TarError as error:
            raise UserError(
                f"shard {index.shards[shard]} is not what the index {index.where} describes (the sample at byte "
                f"{offset:,} {error}): {_again(index)}"
            ) from error


def _again(index: Index) -> str:
    return f"remove the index, and make it again with `{index.command()}`"


def _check_classes(shards: Sequence[str], named: str, config: Config) -> None:
    info = info_beside(list(shards)) if config.model.num_classes else None
    if info is not None and len(info.classes) > config.model.num_classes:
        raise UserError(
            f"{named} has {len(info.classes)} classes but model.num_classes is {config.model.num_classes}: "
            f"set model.num_classes to {len(info.classes)}"
        )


# ---- streams


def _prepare_streams(config: Config, world_size: int) -> StreamData:
    if config.data.train is not None and not isinstance(config.data.train, str):
        raise UserError("data.order is stream, which reads one source: mix sources with data.order: indexed")
    notes: list[str] = []
    shards = find_shards(config.data.train, "train", notes)
    plan = plan_streams(config, world_size=world_size, shards=len(shards))
    _check_stream(shards, "data.train", config)
    held_out = eval_streams(config, notes)
    check_streams_apart(shards, held_out.shards if held_out else (), config.data)
    info = info_beside(shards)
    if info is not None or is_local(shards[0]):  # else nothing can be told before training
        first = islice(read_shard(shards[0]), 1) if is_local(shards[0]) else ()
        _check_soft_labels([_has_soft_labels(info, first)], [str(config.data.train)], [info], config)
    notes += _about_eval(held_out.shards if held_out else (), config)
    samples = config.data.train_samples
    if samples is None and info is not None:
        counts = info.train.shards | info.eval.shards
        names = [Path(shard).name for shard in shards]
        samples = sum(counts[name] for name in names) if all(name in counts for name in names) else None
    return StreamData(plan, tuple(shards), held_out, samples, info.classes if info else None, tuple(notes))


def eval_streams(config: Config, notes: list[str] | None = None) -> StreamedShards | None:
    """The shards of data.eval, to be read from beginning to end; None if it is not set. Raises UserError."""
    return (
        streamed_shards(config.data.eval, "eval", config, named="data.eval", notes=notes) if config.data.eval else None
    )


def streamed_shards(
    pattern: str, split: Split, config: Config, *, named: str, notes: list[str] | None = None
) -> StreamedShards:
    """Shards to be read from beginning to end, after a look at the first samples.

    pattern: as data.eval; of a folder or an index, the shards of `split`. named: what the pattern is, for the UserError
    that is raised if there are no shards, or they do not fit `config`.
    """
    notes = [] if notes is None else notes
    if pattern.endswith(INDEX_SUFFIX):
        index = open_index(any_path(pattern), label_key=config.data.label_key)
        shards = list(_of_split(index, split, notes, named).shards)
    else:
        shards = list_shards([pattern], split, named=named, notes=notes)
    _check_stream(shards, named, config)
    return StreamedShards(tuple(shards), named)


def _check_stream(shards: list[str], named: str, config: Config) -> None:
    local = [shard for shard in shards if is_local(shard)]
    for shard in local:
        if Path(shard).stat().st_size == 0:
            raise UserError(f"shard {shard} of {named} is an empty file: copy or make it again")
    _check_classes(shards, named, config)
    _check_some((sample for shard in local[:1] for sample in islice(read_shard(shard), _LOOKED_AT)), named, config)
