"""WebDataset shards that are to be made anew."""

import contextlib
import json
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

from fastvit_engine.data.build.parallel import ordered_map
from fastvit_engine.data.build.sources.columns import ROW_LEFT_OUT, RowSplits, row_splits, split_column
from fastvit_engine.data.build.sources.context import Context, why_left_out
from fastvit_engine.data.build.sources.listing import Listing, ListingBuilder
from fastvit_engine.data.build.sources.tars import is_tar_name, plain_tars
from fastvit_engine.data.shards.archive import Archive, open_archive
from fastvit_engine.data.shards.image_files import IMAGE_SUFFIXES
from fastvit_engine.data.shards.labels import MAX_LABEL_BYTES, json_field, label_member, label_values
from fastvit_engine.data.shards.names import read_info
from fastvit_engine.data.shards.remote_path import AnyPath, common_folder, matching_files, names_in
from fastvit_engine.data.shards.sample import Ignored, SampleFile, describe_ignored, iterate_files
from fastvit_engine.data.shards.soft_labels import SOFT_MEMBER
from fastvit_engine.data.shards.splits import Splits
from fastvit_engine.data.shards.tar import TarError
from fastvit_engine.errors import UserError
from fastvit_engine.observe.units import counted


class _Unusable(UserError):
    """A sample lacks something; the message says it as if no sample had it, `fault` in a few words."""

    def __init__(self, message: str, fault: str) -> None:
        super().__init__(message)
        self.fault = fault


class LocatedSample(NamedTuple):
    """A sample, and the bytes of its shard that hold it."""

    key: str
    labels: list[str]
    offset: int  # of its first member's header
    size: int  # up to the end of its last member
    fault: str = ""  # why it cannot be used, such as "has no label"
    advice: str = ""  # the same as a whole sentence
    split: str = ""  # what a field of its json says, "" if nothing


def list_webdataset(path: AnyPath, context: Context) -> Listing:
    """A shard, a folder of them, or a glob or brace pattern, with an image and a label member in each sample.

    The labels are those of the member or JSON field that context.labels names, as data.label_key does; otherwise
    "labels" (a list) in `json`, `cls`, or "label" in `json`. The shards of a dataset.json keep their split and class
    names; without one, the names of shards say the split (train..., val..., test...), or the field "split" of `json`,
    as a column of a table does. Other members are left out.
    """
    train, held_out = _shards(path, context)
    info = read_info(str((train or held_out)[0].parent))
    names = info.classes if info else None
    everything = [*train, *held_out]
    plain_shards = plain_tars(everything, context)
    column = None if info else _split_field(plain_shards[0], everything[0])
    shards = [_Task(*paths, context.labels, column) for paths in zip(plain_shards, everything, strict=True)]
    context.progress.start("listing", len(shards), "shards")
    splits = None if column is None else _sample_splits(column, shards, held_out, path, context)
    builder = ListingBuilder()
    builder.eval_only = not train
    builder.labels_refer_to(names)
    all_ignored = Ignored()
    advice = ""
    with contextlib.closing(ordered_map(_samples, shards, workers=context.workers)) as results:
        for task, (samples, ignored) in zip(shards, results, strict=True):
            all_ignored += ignored
            builder.held_out = task.shard in held_out
            builder.add_file("sample", task.plain)
            for sample in samples:
                if splits is not None and sample.split:
                    if splits.is_left_out(sample.split):
                        builder.left_out[ROW_LEFT_OUT] += 1
                        continue
                    builder.held_out = splits.is_held_out(sample.split)
                fault = sample.fault or ("has no split" if splits is not None and not sample.split else "")
                if fault:
                    builder.add_faulty(sample.key, fault)
                    advice = advice or sample.advice
                    continue
                builder.multi_label |= len(sample.labels) != 1
                builder.add(sample.key, sample.labels, sample.offset, sample.size)
            context.progress.update(len(builder.files))
    by_field = f" with splits in the field '{column}' of json" if splits is not None else ""
    context.describe(f"WebDataset, {counted(len(shards), 'shard')}{by_field}")
    if advice and not builder.usable:
        raise UserError(advice)
    builder.left_out.update(all_ignored)
    if all_ignored:
        context.say(f"{path}: {len(builder):,} samples{describe_ignored(all_ignored)}")
    return builder.finish(context.classes or names, str(path))


def _shards(path: AnyPath, context: Context) -> tuple[list[AnyPath], list[AnyPath]]:
    """The shards to train and to evaluate on."""
    if path.is_dir():
        info = read_info(str(path))
        if info is not None:
            train, held_out = (sorted(split.shards) for split in (info.train, info.eval))
            return [path / name for name in train], [path / name for name in held_out]
        files: list[AnyPath] = list(path.iterdir())
        splits = context.choose_by_name(sorted(file.name for file in files if is_tar_name(file.name)), path, "shard")
        context.counts.update(_left_out(file) for file in files if not is_tar_name(file.name) and not _is_ours(file))
        return [path / name for name in splits.train], [path / name for name in splits.val]
    shards = matching_files(path)
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(f"there is no shard {missing[0]}: correct the name")
    folder = common_folder(shards)
    names = names_in(folder, shards)
    if len(Splits.of(names).named()) < 2:
        return shards, []
    splits = context.choose_by_name(names, folder, "shard")
    return [folder / name for name in splits.train], [folder / name for name in splits.val]


def _left_out(file: AnyPath) -> str:
    """What lies beside the shards, such as half of a download: ".part file"."""
    if file.is_dir():
        return f"folder called '{file.name}'"
    return why_left_out(file.name) or "image beside the shards"


def _is_ours(file: AnyPath) -> bool:
    return file.name.endswith(".index")


class _Task(NamedTuple):
    """A shard to list."""

    plain: AnyPath  # the shard, or a decompressed copy
    shard: AnyPath
    label_key: str | None
    split_field: str | None  # of json


def _split_field(plain: AnyPath, shard: AnyPath) -> str | None:
    """The field of json that may say the split of each sample, by the first sample that has a json."""
    try:
        with open_archive(str(plain)) as archive:
            first = next(
                (f for f in iterate_files(archive.read, archive.size, Ignored()) if f.extension == "json"), None
            )
            if first is None or first.member.size > MAX_LABEL_BYTES:
                return None
            fields = json.loads(archive.read(first.member.data, first.member.size))
    except TarError as error:
        raise UserError(f"shard {shard} is damaged (it {error}): copy or make it again") from error
    except OSError as error:
        raise UserError(f"shard {shard} cannot be read ({error.strerror or error}): make it readable") from error
    except (ValueError, RecursionError):
        return None
    return split_column(list(fields)) if isinstance(fields, dict) else None


def _sample_splits(
    column: str, shards: list[_Task], held_out: list[AnyPath], path: AnyPath, context: Context
) -> RowSplits | None:
    """What the field says of the samples; None if it says nothing of splits, or if the names of the shards do.

    Raises UserError if both do, and disagree.
    """
    values: dict[AnyPath, set[str]] = {}
    with contextlib.closing(ordered_map(_splits_of, shards, workers=context.workers)) as results:
        for task, found in zip(shards, results, strict=True):
            values[task.shard] = found
    splits = row_splits(column, set().union(*values.values()), str(path))
    if splits is None or not held_out:
        return splits
    for shard, own in values.items():
        for value in sorted(own - {""}):
            if (splits.parts[value] != "train") != (shard in held_out):
                raise UserError(
                    f"{path} has samples of the split '{value}', by the field '{column}' of json, in the shard "
                    f"{shard.name}: move them to a shard that is named so, or remove the field"
                )
    return None


def _splits_of(task: _Task) -> set[str]:
    return {sample.split for sample in _samples(task)[0]}


def _samples(task: _Task) -> tuple[list[LocatedSample], Ignored]:
    """The samples of a plain tar. Raises UserError naming the original shard if it is damaged."""
    plain, name, label_key, split_field = task
    samples: list[LocatedSample] = []
    ignored = Ignored()
    files: list[SampleFile] = []  # of the current sample
    try:
        with open_archive(str(plain)) as archive:
            for file in iterate_files(archive.read, archive.size, ignored):
                if file.first and files:
                    samples.append(_located(files, archive, name, label_key, split_field))
                    files = []
                files.append(file)
            if files:
                samples.append(_located(files, archive, name, label_key, split_field))
    except TarError as error:
        raise UserError(f"shard {name} is damaged (it {error}): copy or make it again") from error
    except OSError as error:
        raise UserError(f"shard {name} cannot be read ({error.strerror or error}): make it readable") from error
    return samples, ignored


def _located(
    files: list[SampleFile], archive: Archive, shard: AnyPath, label_key: str | None, split_field: str | None
) -> LocatedSample:
    split = "" if split_field is None else _split_in(files, archive, split_field)
    try:
        return _usable(files, archive, shard, label_key)._replace(split=split)
    except _Unusable as error:
        return LocatedSample(files[0].key, [], 0, 0, error.fault, str(error), split)


def _split_in(files: list[SampleFile], archive: Archive, field: str) -> str:
    member = next((file.member for file in files if file.extension == "json"), None)
    if member is None or member.size > MAX_LABEL_BYTES:
        return ""
    try:
        value = json_field(archive.read(member.data, member.size), [field])
    except ValueError:
        return ""
    return "" if value is None else str(value).strip()


def _usable(files: list[SampleFile], archive: Archive, shard: AnyPath, label_key: str | None) -> LocatedSample:
    key, start = files[0].key, files[0].member.start
    where = f"sample {key!r} of shard {shard}"
    members = {file.extension: file.member for file in files}
    if not any(suffix[1:] in members for suffix in IMAGE_SUFFIXES):
        message = f"{where} has no image, only {sorted(members)}: the members of a sample must be adjacent"
        raise _Unusable(message, "has no image")

    if SOFT_MEMBER in members:
        message = f"{where} has a teacher's soft labels, which would be lost: make the shards first, then label them"
        raise _Unusable(message, "has soft labels")

    def read(extension: str) -> bytes:
        member = members[extension]
        if member.size > MAX_LABEL_BYTES:
            raise ValueError(f"{member.size:,} bytes are too many for a label")
        return archive.read(member.data, member.size)

    try:
        labels = _labels(read, members, label_key)
    except ValueError as error:
        message = f"{where} has a label that cannot be read ({error}): make the shard again"
        raise _Unusable(message, "has a label that cannot be read") from error
    if labels is None:
        wanted = f"labels in '{label_key}'" if label_key else "a 'cls' member nor labels in a 'json' member"
        advice = "make the shard again with one, or name the member that has them with --labels json.FIELD"
        message = f"{where} has {'no' if label_key else 'neither'} {wanted}, only {_there(read, members)}: {advice}"
        raise _Unusable(message, "has no label")
    return LocatedSample(key, labels, start, files[-1].member.end - start)


def _there(read: Callable[[str], bytes], members: Mapping[str, Any]) -> str:
    """The members of a sample, and the fields of its JSON."""
    names = ", ".join(sorted(members))
    try:
        fields = json.loads(read("json")) if "json" in members else None
    except (ValueError, RecursionError):
        fields = None
    return f"{names} (json: {', '.join(map(str, fields))})" if isinstance(fields, dict) and fields else names


def _labels(read: Callable[[str], bytes], members: Container[str], label_key: str | None) -> list[str] | None:
    """The labels of a sample as text, None if it has none."""
    if label_key is not None:
        member, path = label_member(label_key)
        return [_text(value) for value in label_values(read(member), path)] or None if member in members else None
    if "json" in members:
        content = read("json")
        labels = json_field(content, ["labels"])
        if isinstance(labels, list):
            return [_text(value) for value in labels]  # none: an image of no class
        if "cls" not in members and (label := json_field(content, ["label"])) is not None:
            return [_text(label)]
    if "cls" in members:
        return [_text(value) for value in label_values(read("cls"), [])] or None
    return None


def _text(label: Any) -> str:
    """A class index or name as text. Raises ValueError for what is neither, such as true or 2.5."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise ValueError(f"{label!r} is neither a class index nor a name")
    return str(label)
