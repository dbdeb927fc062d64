"""`fastvit data make`: writes images to WebDataset shards, reproducible to the byte, and resumes after a kill."""

import collections
import json
import os
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastvit_engine.data.build.encode import encode_for_shard
from fastvit_engine.data.build.failures import Failures
from fastvit_engine.data.build.output import Output, advice_for, open_output, reason_of
from fastvit_engine.data.build.packing import Packing, Shard, make_packing
from fastvit_engine.data.build.parallel import (
    Workers,
    check_workers,
    default_workers,
    ordered_map,
    parallel_map,
    some_of,
)
from fastvit_engine.data.build.receipts import complete_shards, records_of, store_receipt, write_shard
from fastvit_engine.data.build.repeated import check_equal, check_whole
from fastvit_engine.data.build.sources import FORMATS, list_source, list_with_eval
from fastvit_engine.data.build.sources.context import Context
from fastvit_engine.data.build.sources.listing import Listing, describe_classes, describe_left_out
from fastvit_engine.data.build.sources.reading import SourceReader
from fastvit_engine.data.pixels.decode import MAX_PIXELS
from fastvit_engine.data.shards.index import INDEX_NAME, write_index
from fastvit_engine.data.shards.labels import json_field
from fastvit_engine.data.shards.names import INFO_NAME, UNFINISHED_NAME, DatasetInfo, Split, SplitInfo, read_info
from fastvit_engine.data.shards.remote_path import AnyPath, any_path, is_remote
from fastvit_engine.errors import UserError
from fastvit_engine.files import json_lines
from fastvit_engine.observe.progress import WorkProgress
from fastvit_engine.observe.units import counted
from fastvit_engine.shown import public_url, recorded, say
from fastvit_engine.text import read_lines

DEFAULT_EVAL_FRACTION = 0.1
FAILED_NAME = "failed.jsonl"
_DOWNLOADS = 16  # at once, per worker


@dataclass(frozen=True)
class MadeDataset:
    """The result of `make_dataset`."""

    out: AnyPath
    info: DatasetInfo | None  # None if other parts have shards to write


def make_dataset(
    source: str,
    out: AnyPath | str,
    *,
    format: str | None = None,
    labels: str | None = None,
    classes: AnyPath | None = None,
    eval_source: str | None = None,
    eval_labels: str | None = None,
    eval_fraction: float | None = None,
    samples_per_shard: int = 1000,
    seed: int = 0,
    resize: int | None = None,
    quality: int = 90,
    max_pixels: int | None = None,
    dedup: bool = False,
    leave_out: Sequence[str] = (),
    image_column: str | None = None,
    label_column: str | None = None,
    max_failed: float = 0.0,
    workers: Workers | None = None,
    part: tuple[int, int] = (1, 1),
    plan_only: bool = False,
    progress: Callable[[str], None] = say,
) -> MadeDataset:
    """Writes the images of `source` (see `sources`) to train and eval shards in `out`; both may be in object stores.

    `image_column` and `label_column` name columns of a list or of Parquet files.

    The listing, the split and the global shuffle are decided first and stored; then `workers` processes, or those of an
    executor, write shards in parallel, each atomically. After a kill, a full disk or a bad image, the same call keeps
    the complete shards and writes the others, byte for byte as without the interruption. `part` (i, n) writes every
    n-th shard from the i-th. The part that completes the last shard writes dataset.json; a folder that has it is
    complete, and the same call does nothing more.

    Samples have an image, `cls` (the index of the first label) and, if the source gives several labels, `json`:
    {"labels": [...]}. An image with more than `max_pixels` (default: as data.max_pixels) has failed. `leave_out` has
    patterns of what is not taken: folders, by their path in `source`, or files.

    Raises UserError for bad arguments, sources that can be read in two ways, bad images (more than the fraction
    `max_failed`) and failed writes.
    """
    _check_arguments(
        format, eval_fraction, samples_per_shard, seed, resize, quality, max_pixels, max_failed, workers, part, labels,
        label_column,
    )  # fmt: skip
    arguments: dict[str, Any] = {
        "source": _resolved(source),
        "seed": seed,
        "eval_fraction": eval_fraction,
        "samples_per_shard": samples_per_shard,
        "format": format,
        "labels": labels,
        "classes": str(classes) if classes else None,
        "eval_source": eval_source and _resolved(eval_source),
        "eval_labels": eval_labels,
        "resize": resize,
        "quality": quality,
        "max_pixels": max_pixels,
        "dedup": dedup,
        "leave_out": list(leave_out),
        "image_column": image_column,
        "label_column": label_column,
    }
    path = any_path(out) if isinstance(out, str) else out
    with open_output(path) as output:
        made = read_info(str(path))
        if made is not None:
            _check_same(path, made, arguments)
            check_whole(path, made)
            output.finish()
            progress(f"{path} is already made: {made.train.samples:,} train and {made.eval.samples:,} eval samples")
            return MadeDataset(path, made)
        return _make(output, arguments, part, max_failed, workers or default_workers(), plan_only, progress)


def _make(
    output: Output,
    arguments: dict[str, Any],
    part: tuple[int, int],
    max_failed: float,
    workers: Workers,
    plan_only: bool,
    progress: Callable[[str], None],
) -> MadeDataset:
    """Begins or resumes a data set; removes what it began if no shard was completed."""
    out = output.path
    existed, begun = output.exists(), output.is_begun()
    display = WorkProgress()
    try:
        if existed and not begun and not output.is_empty():
            raise UserError(f"{out} is not empty and was not made by `fastvit data make`: choose another --out")
        output.begin()
        check_workers(workers, [arguments["source"]], output.shared_folder)
        packing = _packing(output, arguments, workers, display, progress)
        if plan_only:
            display.clear()
            progress(f"{out}: planned {len(packing.train):,} train and {len(packing.eval):,} eval samples")
            return MadeDataset(out, None)
        check_workers(workers, some_of(_local_files(packing.listing)), output.shared_folder)
        _write_shards(output, packing, part, max_failed, workers, display, progress)
        display.clear()
        return _finish(output, packing, part, workers, progress)
    except Exception as error:
        if part == (1, 1) and not begun:
            _remove_if_nothing_is_complete(output, remove_folder=not existed)
        if isinstance(error, FileNotFoundError) and (made := read_info(str(out))) is not None:
            return MadeDataset(out, made)  # another part was faster: all is written, and the packing removed
        if isinstance(error, OSError):
            raise UserError(f"cannot write to {out} ({reason_of(error)}): {advice_for(output, error)}") from error
        raise
    finally:
        display.clear()


def _check_arguments(
    format: str | None,
    eval_fraction: float | None,
    samples_per_shard: int,
    seed: int,
    resize: int | None,
    quality: int,
    max_pixels: int | None,
    max_failed: float,
    workers: Workers | None,
    part: tuple[int, int],
    labels: str | None,
    label_column: str | None,
) -> None:
    if eval_fraction is not None and not 0 <= eval_fraction < 1:
        raise UserError(f"--eval-fraction is {eval_fraction}: it must be at least 0 and below 1")
    if not 0 <= max_failed < 1:
        raise UserError(f"--max-failed is {max_failed}: it must be at least 0 and below 1")
    if not 1 <= quality <= 100:
        raise UserError(f"--quality is {quality}: it must be between 1 and 100")
    if max_pixels is not None and not 1 <= max_pixels <= 2 * MAX_PIXELS:
        raise UserError(f"--max-pixels is {max_pixels}: it must be between 1 and {2 * MAX_PIXELS}, as data.max_pixels")
    if not 1 <= part[0] <= part[1]:
        raise UserError(f"--part is {part[0]}/{part[1]}: it must be between 1/{part[1]} and {part[1]}/{part[1]}")
    if format is not None and format not in FORMATS:
        raise UserError(f"--format is {format}: it must be one of {', '.join(sorted(FORMATS))}")
    if labels is not None and label_column is not None:
        raise UserError("--labels and --label-column both name the column of labels: leave out one of them")
    if seed < 0:
        raise UserError(f"--seed is {seed}: it must be at least 0")
    counts = {
        "--samples-per-shard": samples_per_shard,
        "--resize": resize,
        "--workers": workers if isinstance(workers, int) else None,
    }
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1")


def _resolved(source: str) -> str:
    return source if source == "digits" else str(any_path(source).resolve())


def _check_same(out: AnyPath, made: DatasetInfo, arguments: dict[str, Any]) -> None:
    before = {name: getattr(made, name) for name in ("source", "seed", "eval_fraction", "samples_per_shard")}
    if arguments["eval_fraction"] is None and made.eval_fraction in (None, DEFAULT_EVAL_FRACTION):
        before["eval_fraction"] = None
    check_equal(out, "was", before | made.options, arguments)


def _packing(
    output: Output, arguments: dict[str, Any], workers: Workers, display: WorkProgress, progress: Callable[[str], None]
) -> Packing:
    """The packing of a run that was stopped, or of another part; otherwise a new one."""
    out = output.path
    # Looked for first: another part may store its packing, and then receipts, at any moment.
    has_receipts = bool(output.receipts())
    stored = output.stored_packing()
    if stored is not None:
        packing = _loaded(output, stored)
        check_equal(out, "is being", packing.arguments, arguments)
        return packing
    if has_receipts and read_info(str(out)) is None:
        raise UserError(
            f"{out}/{UNFINISHED_NAME} says which shards are complete but not what they were made from: "
            f"remove the folder {out} or choose another --out"
        )

    def say(text: str) -> None:
        display.clear()
        progress(text)

    context = Context(
        output.unpacked,
        workers,
        display,
        say,
        labels=arguments["labels"],
        leave_out=arguments["leave_out"],
        source=arguments["source"],
        out=str(out),
        image_column=arguments["image_column"],
        label_column=arguments["label_column"],
    )
    if arguments["classes"]:
        context.classes = _class_names(any_path(arguments["classes"]))
    source, format = arguments["source"], arguments["format"]
    if arguments["eval_source"]:
        listing = list_with_eval(source, format, arguments["eval_source"], arguments["eval_labels"], context)
    else:
        listing = list_source(source, format, context)
    for option, value in (("--image-column", context.image_column), ("--label-column", context.label_column)):
        if value is not None and option not in context.column_options:
            raise UserError(
                f"{option} names a column of a list or of Parquet files, but {source} is neither: leave it out"
            )
    eval_fraction = _eval_fraction(listing, arguments)
    say(_what_was_found(listing, arguments, eval_fraction, context))
    packing = make_packing(listing, arguments, eval_fraction=eval_fraction, workers=workers, progress=display)
    return _loaded(output, output.save_packing(packing.save))


def _loaded(output: Output, folder: Path) -> Packing:
    """The packing in a folder; without the folder's name if other machines do not see it."""
    packing = Packing.load(folder)
    return packing if output.shared_folder is not None else replace(packing, folder=None)


def _what_was_found(listing: Listing, arguments: dict[str, Any], eval_fraction: float | None, context: Context) -> str:
    """What the source was taken for, in one line: format, splits, classes, images, what is left out and why."""
    held_out = int(listing.held_out.sum())
    split = (
        f"{counted(held_out, 'image')} to evaluate on"
        if eval_fraction is None
        else f"{eval_fraction:.4g} of each class to evaluate on"
    )
    found = f"{arguments['source']}: {'; '.join(context.descriptions)}: "
    purpose = " to train on" if eval_fraction is None else ""
    train = "" if listing.eval_only else f"{counted(len(listing) - held_out, 'image')}{purpose}, "
    found += f"{train}{split}{', none to train on' if listing.eval_only else ''}; {describe_classes(listing)}"
    if listing.multi_label:
        most = max(1, int(np.diff(listing.label_start).max(initial=0)))
        found += f", up to {most} per image (read them with data.label_key=json.labels and data.max_labels={most})"
    left_out = [*([describe_left_out(listing.left_out)] if listing.left_out else []), *context.left_out]
    return found + (f"; left out: {'; '.join(left_out)}" if left_out else "")


def _eval_fraction(listing: Listing, arguments: dict[str, Any]) -> float | None:
    given: float | None = arguments["eval_fraction"]
    if not listing.held_out.any():
        return DEFAULT_EVAL_FRACTION if given is None else given
    if given is not None:
        raise UserError(f"{arguments['source']} has an eval split of its own: leave out --eval-fraction")
    return None


def _class_names(path: AnyPath) -> list[str]:
    try:
        names = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the class names {path} cannot be read ({error}): write one name per line") from error
    if not names:
        raise UserError(f"{path} holds no class name: write one per line")
    return names


def _local_files(listing: Listing) -> list[str]:
    """A few of the local files that images are read from."""
    holding = [file.path for file in listing.files if file.kind not in ("path", "url")]
    images = [(listing.files[listing.file[index]], listing.name(index)) for index in some_of(range(len(listing)))]
    paths = [*some_of(holding), *(os.path.join(file.path, name) for file, name in images if file.kind == "path")]
    return [path for path in paths if not is_remote(path)]


def _write_shards(
    output: Output,
    packing: Packing,
    part: tuple[int, int],
    max_failed: float,
    workers: Workers,
    display: WorkProgress,
    progress: Callable[[str], None],
) -> None:
    """Writes the shards of `part` that are not complete yet."""
    mine = packing.shards()[part[0] - 1 :: part[1]]
    found = complete_shards(output, [shard.name for shard in mine])
    receipts = {shard: found[shard.name] for shard in mine if shard.name in found}
    missing = [shard for shard in mine if shard not in receipts]
    if len(missing) < len(mine):
        progress(f"{output.path}: {len(mine) - len(missing):,} of {len(mine):,} shards are complete, making the others")
    total = sum(shard.end - shard.start for shard in mine)
    with output.temporary_folder(f"part-{part[0]}-of-{part[1]}") as temporary:
        failures = Failures(max_failed, total)
        writer = _ShardWriter(output, temporary, packing, failures)
        for shard, receipt in receipts.items():
            failures.done.add(shard.end - shard.start)
            failures.failed.add(len(receipt.failed))

        def show() -> None:
            failed = failures.failed.value
            display.update(failures.done.value, f"{failed:,} failed" if failed else "")

        display.start("writing", total, "images")
        for _ in parallel_map(writer.write, missing, workers=workers, while_waiting=show):
            pass


class _ShardWriter:
    """Writes shards, one at a time, in a worker process."""

    def __init__(self, output: Output, temporary: Path, packing: Packing, failures: Failures) -> None:
        self._output, self._temporary, self._packing, self._failures = output, temporary, packing, failures
        self._reader = SourceReader(packing.listing)
        self._downloads = any(file.kind == "url" or is_remote(file.path) for file in packing.listing.files)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}  # whose listing is that of the packing

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _reader=SourceReader(state["_packing"].listing))

    def write(self, shard: Shard) -> None:
        warnings.simplefilter("ignore")  # Pillow's, about odd but readable images
        try:
            failed: list[list[str]] = []
            samples = self._usable(self._packing.indices(shard).tolist(), failed)
            receipt = write_shard(self._output, shard.name, self._temporary, samples)
            store_receipt(self._output, shard.name, receipt._replace(failed=failed), self._temporary)
        except OSError as error:
            advice = advice_for(self._output, error, " and run the same command again")
            raise UserError(f"cannot write to {self._output.path} ({reason_of(error)}): {advice}") from error

    def _usable(self, indices: Sequence[int], failed: list[list[str]]) -> Iterator[dict[str, Any]]:
        """The samples that can be written; the others are added to `failed`, by name and reason."""
        for index, members in self._samples(indices):
            if isinstance(members, str):
                failed.append([self._reader.where(index), members])
                self._failures.add(*failed[-1])
            else:
                yield members
            self._failures.done.add()

    def _samples(self, indices: Sequence[int]) -> Iterator[tuple[int, dict[str, Any] | str]]:
        """Yields (index, members, or why there are none) in the given order; downloads run ahead."""
        if not self._downloads:
            for index in indices:
                yield index, self._sample(index)
            return
        with ThreadPoolExecutor(_DOWNLOADS) as pool:
            ahead: deque[tuple[int, Future[dict[str, Any] | str]]] = deque()
            for index in indices:
                ahead.append((index, pool.submit(self._sample, index)))
                if len(ahead) >= 2 * _DOWNLOADS:
                    first, future = ahead.popleft()
                    yield first, future.result()
            for index, future in ahead:
                yield index, future.result()

    def _sample(self, index: int) -> dict[str, Any] | str:
        listing, arguments = self._packing.listing, self._packing.arguments
        try:
            encoded = self._reader.read(index)
            extension, image = encode_for_shard(
                encoded.image,
                arguments["resize"],
                arguments["quality"],
                arguments.get("max_pixels") or MAX_PIXELS,
                listing.files[listing.file[index]].border,
            )
            labels = listing.labels_of(index)
            json_member = _json_member(encoded.json, labels) if listing.multi_label else encoded.json
        except ValueError as error:
            return str(error)
        except OSError as error:
            return f"cannot be read ({error.strerror or error})"
        members: dict[str, Any] = {"__key__": _key(index, listing.name(index)), extension: image}
        if labels:
            members["cls"] = str(labels[0]).encode()
        if json_member is not None:
            members["json"] = json_member
        return members


def _json_member(given: bytes | None, labels: list[int]) -> bytes:
    """Returns the `json` that the sample had, with {"labels": [...]} added. Raises ValueError if it is not JSON."""
    try:
        before = json_field(given, []) if given else {}
    except ValueError as error:
        raise ValueError(f"has a json member that cannot be read ({error})") from error
    return json.dumps((before if isinstance(before, dict) else {}) | {"labels": labels}).encode()


def _key(index: int, name: str) -> str:
    """Returns a key without dots that fits into a tar header; the number alone makes it unique."""
    stem = public_url(name).rstrip("/").rpartition("/")[2]
    stem = stem.rpartition(".")[0] or stem
    return f"{index:08d}_{re.sub(r'[^A-Za-z0-9_-]+', '_', stem)[:60]}"


def _finish(
    output: Output, packing: Packing, part: tuple[int, int], workers: Workers, progress: Callable[[str], None]
) -> MadeDataset:
    """Writes dataset.json if all shards are complete."""
    out, shards = output.path, packing.shards()
    found = complete_shards(output, [shard.name for shard in shards])
    complete = {shard: found[shard.name] for shard in shards if shard.name in found}
    if len(complete) < len(shards):
        made = read_info(str(out))  # another part may have finished it in the meantime, and removed the receipts
        if made is None:
            progress(
                f"{out}: part {part[0]} of {part[1]} is complete, {len(shards) - len(complete):,} shards are left to "
                "other parts"
            )
        return MadeDataset(out, made)

    def split_info(split: Split) -> SplitInfo:
        shards = {shard.name: receipt.samples for shard, receipt in complete.items() if shard.split == split}
        return SplitInfo(samples=sum(shards.values()), shards={name: n for name, n in shards.items() if n})

    failed = [entry for receipt in complete.values() for entry in receipt.failed]
    faults = collections.Counter(reason.partition(" (")[0] for _, reason in failed)
    not_listed = dict(packing.listing.left_out) | ({"duplicate": packing.duplicates} if packing.duplicates else {})
    named = ("source", "seed", "samples_per_shard")
    info = DatasetInfo(
        classes=packing.listing.classes,
        eval_fraction=packing.eval_fraction,
        options={
            name: recorded(value) for name, value in packing.arguments.items() if name not in (*named, "eval_fraction")
        },
        duplicates=packing.duplicates,
        failed=len(failed),
        left_out=dict(sorted(not_listed.items()))
        | {f"image that failed ({fault})": count for fault, count in sorted(faults.items())},
        train=split_info("train"),
        eval=split_info("eval"),
        **{name: recorded(packing.arguments[name]) for name in named},
    )
    if not (info.eval if packing.listing.eval_only else info.train).samples:
        example = " ".join(failed[0])
        use = "evaluation" if packing.listing.eval_only else "training"
        raise UserError(f"no image for {use} is left of {packing.arguments['source']}, {example}: repair the source")
    if failed:
        lines = json_lines(recorded({"image": where, "reason": reason}) for where, reason in failed)
        output.write(FAILED_NAME, lines)
    names = [*info.train.shards, *info.eval.shards]
    run = None if isinstance(workers, int) else partial(ordered_map, workers=workers)
    write_index([str(out / name) for name in names], out / INDEX_NAME, records=records_of(out, found), run=run)
    output.write(INFO_NAME, (info.model_dump_json(indent=2) + "\n").encode())
    output.finish()
    progress(
        f"{out}: {counted(len(info.classes), 'class', 'classes')}, "
        f"{counted(info.train.samples, 'train sample')} in {counted(len(info.train.shards), 'shard')}, "
        f"{counted(info.eval.samples, 'eval sample')} in {counted(len(info.eval.shards), 'shard')}"
        + (f"; left out {describe_left_out(info.left_out)}" if info.left_out else "")
        + (f"; {FAILED_NAME} names those that failed" if failed else "")
    )
    return MadeDataset(out, info)


def _remove_if_nothing_is_complete(output: Output, *, remove_folder: bool) -> None:
    if output.is_begun() and not output.receipts():
        output.abandon(remove_folder=remove_folder)  # a worker may have been stopped between a shard and its receipt
