"""`fastvit data make`: writes images to WebDataset shards, reproducible to the byte, and resumes after a kill."""

import collections
import contextlib
import json
import math
import re
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from webdataset.writer import TarWriter

from fastvit_engine.data.build.encode import encode_for_shard
from fastvit_engine.data.build.packing import Packing, Shard, make_packing
from fastvit_engine.data.build.parallel import (
    Counter,
    Workers,
    check_workers,
    default_workers,
    ordered_map,
    parallel_map,
    some_of,
)
from fastvit_engine.data.build.sources import FORMATS, list_source, list_with_eval
from fastvit_engine.data.build.sources.context import Context
from fastvit_engine.data.build.sources.listing import Listing, describe_classes, describe_left_out
from fastvit_engine.data.build.sources.reading import SourceReader
from fastvit_engine.data.shards.index import INDEX_NAME, write_index
from fastvit_engine.data.shards.labels import json_field
from fastvit_engine.data.shards.names import INFO_NAME, UNFINISHED_NAME, DatasetInfo, Split, SplitInfo, read_info
from fastvit_engine.errors import UserError
from fastvit_engine.files import atomic_write, atomic_writer, json_lines
from fastvit_engine.observe.progress import WorkProgress
from fastvit_engine.observe.units import counted
from fastvit_engine.shown import public_url, recorded, say
from fastvit_engine.text import read_lines

DEFAULT_EVAL_FRACTION = 0.1
FAILED_NAME = "failed.jsonl"
_DOWNLOADS = 16  # at once, per worker
_FEW = 1000  # the fraction of failures is judged over at least this many images


@dataclass(frozen=True)
class MadeDataset:
    """The result of `make_dataset`."""

    out: Path
    info: DatasetInfo | None  # None if other parts have shards to write


class Receipt(NamedTuple):
    """The record of a complete shard, in a file of its own until all shards are complete."""

    samples: int
    bytes: int
    failed: list[list[str]]  # name and reason


def make_dataset(
    source: str,
    out: Path,
    *,
    format: str | None = None,
    labels: str | None = None,
    classes: Path | None = None,
    eval_source: str | None = None,
    eval_labels: str | None = None,
    eval_fraction: float | None = None,
    samples_per_shard: int = 1000,
    seed: int = 0,
    resize: int | None = None,
    quality: int = 90,
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
    """Writes the images of `source` (see `sources`) to train and eval shards in `out`.

    `image_column` and `label_column` name columns of a list or of Parquet files.

    The listing, the split and the global shuffle are decided first and stored; then `workers` processes, or those of an
    executor, write shards in parallel, each atomically. After a kill, a full disk or a bad image, the same call keeps
    the complete shards and writes the others, byte for byte as without the interruption. `part` (i, n) writes every
    n-th shard from the i-th. The part that completes the last shard writes dataset.json; a folder that has it is
    complete, and the same call does nothing more.

    Samples have an image, `cls` (the index of the first label) and, if the source gives several labels, `json`:
    {"labels": [...]}. `leave_out` has patterns of what is not taken: folders, by their path in `source`, or files.

    Raises UserError for bad arguments, sources that can be read in two ways, bad images (more than the fraction
    `max_failed`) and failed writes.
    """
    _check_arguments(
        format, eval_fraction, samples_per_shard, seed, resize, quality, max_failed, workers, part, labels, label_column
    )
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
        "dedup": dedup,
        "leave_out": list(leave_out),
        "image_column": image_column,
        "label_column": label_column,
    }
    unfinished = out / UNFINISHED_NAME
    made = read_info(out)
    if made is not None:
        _check_same(out, made, arguments)
        shutil.rmtree(unfinished, ignore_errors=True)
        progress(f"{out} is already made: {made.train.samples:,} train and {made.eval.samples:,} eval samples")
        return MadeDataset(out, made)

    return _make(out, arguments, part, max_failed, workers or default_workers(), plan_only, progress)


def _make(
    out: Path,
    arguments: dict[str, Any],
    part: tuple[int, int],
    max_failed: float,
    workers: Workers,
    plan_only: bool,
    progress: Callable[[str], None],
) -> MadeDataset:
    """Begins or resumes a data set; removes what it began if no shard was completed."""
    unfinished = out / UNFINISHED_NAME
    existed, begun = out.exists(), unfinished.exists()
    display = WorkProgress()
    try:
        if existed and not begun and any(out.iterdir()):
            raise UserError(f"{out} is not empty and was not made by `fastvit data make`: choose another --out")
        (unfinished / "receipts").mkdir(parents=True, exist_ok=True)
        check_workers(workers, [arguments["source"]], unfinished)
        packing = _packing(out, arguments, workers, display, progress)
        if plan_only:
            display.clear()
            progress(f"{out}: planned {len(packing.train):,} train and {len(packing.eval):,} eval samples")
            return MadeDataset(out, None)
        check_workers(workers, some_of(_local_files(packing.listing)), unfinished)
        _write_shards(out, packing, part, max_failed, workers, display, progress)
        display.clear()
        return _finish(out, packing, part, workers, progress)
    except Exception as error:
        if part == (1, 1) and not begun:
            _remove_if_nothing_is_complete(out, remove_folder=not existed)
        if isinstance(error, FileNotFoundError) and (made := read_info(out)) is not None:
            return MadeDataset(out, made)  # another part was faster: all is written, and the packing removed
        if isinstance(error, OSError):
            raise UserError(f"cannot write to {out} ({error.strerror}): make room or choose another --out") from error
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
    return source if source == "digits" else str(Path(source).expanduser().resolve())


def _check_same(out: Path, made: DatasetInfo, arguments: dict[str, Any]) -> None:
    before = {name: getattr(made, name) for name in ("source", "seed", "eval_fraction", "samples_per_shard")}
    if arguments["eval_fraction"] is None and made.eval_fraction in (None, DEFAULT_EVAL_FRACTION):
        before["eval_fraction"] = None
    _check_equal(out, "was", before | made.options, arguments)


def _check_equal(out: Path, tense: str, before: dict[str, Any], arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if name in before and recorded(before[name]) != recorded(value):
            raise UserError(
                f"{out} {tense} made {_option(name, before[name])}, not {_option(name, value)}: remove the folder "
                "or choose another --out"
            )


def _option(name: str, value: Any) -> str:
    """An argument as the command line takes it: "with --eval-fraction 0.2", or "without --eval-fraction"."""
    if name == "source":
        return f"from {value}"
    option = f"--{name.replace('_', '-')}"
    if value is None or value is False or value == []:
        return f"without {option}"
    if isinstance(value, list):
        return f"with {' '.join(f'{option} {entry}' for entry in value)}"
    return f"with {option}" if value is True else f"with {option} {value}"


def _packing(
    out: Path, arguments: dict[str, Any], workers: Workers, display: WorkProgress, progress: Callable[[str], None]
) -> Packing:
    """The packing of a run that was stopped, or of another part; otherwise a new one."""
    unfinished = out / UNFINISHED_NAME
    folder = unfinished / "packing"
    # Looked for first: another part may store its packing, and then receipts, at any moment.
    has_receipts = any((unfinished / "receipts").glob("*.json"))
    for stored in (folder, unfinished / "plan"):  # the second is that of an earlier version
        if stored.exists():
            packing = Packing.load(stored)
            _check_equal(out, "is being", packing.arguments, arguments)
            return packing
    if has_receipts and read_info(out) is None:
        raise UserError(
            f"{unfinished} says which shards are complete but not what they were made from: remove the folder {out} "
            "or choose another --out"
        )

    def say(text: str) -> None:
        display.clear()
        progress(text)

    context = Context(
        unfinished / "unpacked",
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
        context.classes = _class_names(Path(arguments["classes"]))
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
    packing.save(folder)
    return Packing.load(folder)


def _what_was_found(listing: Listing, arguments: dict[str, Any], eval_fraction: float | None, context: Context) -> str:
    """What the source was taken for, in one line: format, splits, classes, images, what is left out and why."""
    held_out = int(listing.held_out.sum())
    split = (
        f"{counted(held_out, 'image')} to evaluate on"
        if eval_fraction is None
        else f"{eval_fraction:.4g} of each class to evaluate on"
    )
    found = f"{arguments['source']}: {'; '.join(context.descriptions)}: "
    found += f"{counted(len(listing) - held_out, 'image')} to train on, {split}; {describe_classes(listing)}"
    left_out = [*([describe_left_out(listing.left_out)] if listing.left_out else []), *context.left_out]
    return found + (f"; left out: {'; '.join(left_out)}" if left_out else "")


def _eval_fraction(listing: Listing, arguments: dict[str, Any]) -> float | None:
    given: float | None = arguments["eval_fraction"]
    if not listing.held_out.any():
        return DEFAULT_EVAL_FRACTION if given is None else given
    if given is not None:
        raise UserError(f"{arguments['source']} has an eval split of its own: leave out --eval-fraction")
    return None


def _class_names(path: Path) -> list[str]:
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
    return [*some_of(holding), *(str(Path(file.path, name)) for file, name in images if file.kind == "path")]


def _write_shards(
    out: Path,
    packing: Packing,
    part: tuple[int, int],
    max_failed: float,
    workers: Workers,
    display: WorkProgress,
    progress: Callable[[str], None],
) -> None:
    """Writes the shards of `part` that are not complete yet."""
    mine = packing.shards()[part[0] - 1 :: part[1]]
    receipts = {shard: _receipt(out, shard) for shard in mine}
    missing = [shard for shard, receipt in receipts.items() if receipt is None]
    if len(missing) < len(mine):
        progress(f"{out}: {len(mine) - len(missing):,} of {len(mine):,} shards are complete, making the others")
    temporary = out / UNFINISHED_NAME / f"part-{part[0]}-of-{part[1]}"
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed run of this part
    temporary.mkdir(exist_ok=True)
    total = sum(shard.end - shard.start for shard in mine)
    writer = _ShardWriter(out, temporary, packing, max_failed, total)
    for shard, receipt in receipts.items():
        if receipt is not None:
            writer.done.add(shard.end - shard.start)
            writer.failed.add(len(receipt.failed))

    def show() -> None:
        failed = writer.failed.value
        display.update(writer.done.value, f"{failed:,} failed" if failed else "")

    display.start("writing", total, "images")
    try:
        for _ in parallel_map(writer.write, missing, workers=workers, while_waiting=show):
            pass
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _NothingToWrite(Exception):
    """No image of a shard was usable."""


class _ShardWriter:
    """Writes shards, one at a time, in a worker process."""

    def __init__(self, out: Path, temporary: Path, packing: Packing, max_failed: float, total: int) -> None:
        self.done, self.failed = Counter(), Counter()  # images, over all workers
        self._out, self._temporary, self._packing = out, temporary, packing
        self._max_failed, self._total = max_failed, total
        self._reader = SourceReader(packing.listing)
        self._downloads = any(file.kind == "url" for file in packing.listing.files)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}  # whose listing is that of the packing

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _reader=SourceReader(state["_packing"].listing))

    def write(self, shard: Shard) -> None:
        warnings.simplefilter("ignore")  # Pillow's, about odd but readable images
        try:
            self._write_receipt(shard, self._write_shard(shard))
        except OSError as error:
            raise UserError(
                f"cannot write to {self._out} ({error.strerror}): make room and run the same command again, "
                "or choose another --out"
            ) from error

    def _write_shard(self, shard: Shard) -> Receipt:
        """Writes the shard, unless all of its images have failed."""
        failed: list[list[str]] = []
        samples = size = 0
        path = self._out / shard.name
        with contextlib.suppress(_NothingToWrite), atomic_writer(path, temporary_folder=self._temporary) as file:
            with TarWriter(file, user="fastvit", group="fastvit", mtime=0, encoder=False) as tar:
                for index, members in self._samples(self._packing.indices(shard).tolist()):
                    if isinstance(members, str):
                        failed.append([self._reader.where(index), members])
                        self._count_failure(*failed[-1])
                    else:
                        tar.write(members)
                        samples += 1
                    self.done.add()
            if not samples:
                raise _NothingToWrite
            size = file.tell()
        return Receipt(samples, size, failed)

    def _write_receipt(self, shard: Shard, receipt: Receipt) -> None:
        with atomic_writer(_receipt_path(self._out, shard), temporary_folder=self._temporary) as file:
            file.write(json.dumps(receipt._asdict()).encode())

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
            extension, image = encode_for_shard(encoded.image, arguments["resize"], arguments["quality"])
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

    def _count_failure(self, where: str, reason: str) -> None:
        self.failed.add()
        judged_over = max(self.done.value + 1, min(_FEW, self._total))
        if self.failed.value <= self._max_failed * judged_over:
            return
        enough = _share_that_allows(self.failed.value, judged_over)
        if self._max_failed == 0:
            remedy = f"repair it, or leave bad images out with --max-failed {enough}, and run again"
            raise UserError(f"{where} {reason}: {remedy if enough else 'repair it, and run again'}")
        raise UserError(
            f"{self.failed.value:,} of {self.done.value + 1:,} images failed, more than --max-failed "
            f"{self._max_failed} allows; the last one, {where}, {reason}: repair the source"
            + (f", or allow more with --max-failed {enough}" if enough else "")
        )


def _share_that_allows(failed: int, images: int) -> str | None:
    """The smallest value of --max-failed, to one digit, with which so many may fail; None if all of them did."""
    scale = 10.0 ** math.floor(math.log10(failed / images))
    shares = (float(f"{digit * scale:g}") for digit in range(1, 11))
    share = next(share for share in shares if failed <= share * images)
    return f"{share:g}" if share < 1 else None


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


def _receipt_path(out: Path, shard: Shard) -> Path:
    return out / UNFINISHED_NAME / "receipts" / f"{shard.name}.json"


def _receipt(out: Path, shard: Shard) -> Receipt | None:
    """Returns the receipt of a shard, None if the shard is not complete or its receipt is damaged."""
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
        receipt = Receipt(**json.loads(_receipt_path(out, shard).read_text()))
        if receipt.samples == 0 or (out / shard.name).stat().st_size == receipt.bytes:
            return receipt
    return None


def _finish(
    out: Path, packing: Packing, part: tuple[int, int], workers: Workers, progress: Callable[[str], None]
) -> MadeDataset:
    """Writes dataset.json if all shards are complete."""
    receipts = {shard: _receipt(out, shard) for shard in packing.shards()}
    complete = {shard: receipt for shard, receipt in receipts.items() if receipt is not None}
    if len(complete) < len(receipts):
        made = read_info(out)  # another part may have finished it in the meantime, and removed the receipts
        if made is None:
            progress(
                f"{out}: part {part[0]} of {part[1]} is complete, {len(receipts) - len(complete):,} shards are left to "
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
        left_out=not_listed | {f"image that failed ({fault})": count for fault, count in sorted(faults.items())},
        train=split_info("train"),
        eval=split_info("eval"),
        **{name: recorded(packing.arguments[name]) for name in named},
    )
    if not info.train.samples:
        example = " ".join(failed[0])
        raise UserError(f"no image for training is left of {packing.arguments['source']}, {example}: repair the source")
    if failed:
        atomic_write(
            out / FAILED_NAME, json_lines(recorded({"image": where, "reason": reason}) for where, reason in failed)
        )
    write_index(
        [str(out / name) for name in [*info.train.shards, *info.eval.shards]],
        out / INDEX_NAME,
        run=None if isinstance(workers, int) else partial(ordered_map, workers=workers),
    )
    atomic_write(out / INFO_NAME, info.model_dump_json(indent=2) + "\n")
    shutil.rmtree(out / UNFINISHED_NAME, ignore_errors=True)
    progress(
        f"{out}: {counted(len(info.classes), 'class', 'classes')}, "
        f"{counted(info.train.samples, 'train sample')} in {counted(len(info.train.shards), 'shard')}, "
        f"{counted(info.eval.samples, 'eval sample')} in {counted(len(info.eval.shards), 'shard')}"
        + (f"; left out {describe_left_out(info.left_out)}" if info.left_out else "")
        + (f"; {FAILED_NAME} names those that failed" if failed else "")
    )
    return MadeDataset(out, info)


def _remove_if_nothing_is_complete(out: Path, *, remove_folder: bool) -> None:
    unfinished = out / UNFINISHED_NAME
    if not unfinished.is_dir() or any((unfinished / "receipts").glob("*.json")):
        return
    for split in ("train", "eval"):  # a worker may have been stopped between a shard and its receipt
        for path in out.glob(f"{split}-*.tar"):
            path.unlink()
    shutil.rmtree(unfinished)
    if remove_folder:
        with contextlib.suppress(OSError):  # not empty
            out.rmdir()
