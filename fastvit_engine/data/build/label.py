"""`fastvit data label`: writes shards again with the labels that a model gives their images."""

import json
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastvit_engine.config import Config
from fastvit_engine.data.build.failures import Failures
from fastvit_engine.data.build.make import FAILED_NAME, MadeDataset
from fastvit_engine.data.build.output import Output, advice_for, open_output, reason_of
from fastvit_engine.data.build.parallel import default_workers
from fastvit_engine.data.build.receipts import Receipt, complete_shards, records_of, store_receipt, write_shard
from fastvit_engine.data.build.repeated import check_equal, check_whole
from fastvit_engine.data.build.sources.listing import describe_left_out
from fastvit_engine.data.pixels.eval_image import eval_image
from fastvit_engine.data.shards.archive import read_shard
from fastvit_engine.data.shards.index import INDEX_NAME, Index, write_index
from fastvit_engine.data.shards.names import (
    INFO_NAME,
    DatasetInfo,
    SplitInfo,
    TeacherInfo,
    info_beside,
    list_shards,
    read_info,
)
from fastvit_engine.data.shards.remote_path import AnyPath, any_path
from fastvit_engine.data.shards.sample import Sample
from fastvit_engine.data.shards.soft_labels import MOST_IN_A_BLOCK, SOFT_MEMBER, format_soft_label
from fastvit_engine.data.shards.usable import SampleKeys, Unusable, name_of, read_image
from fastvit_engine.errors import UserError
from fastvit_engine.files import json_lines
from fastvit_engine.observe.progress import WorkProgress
from fastvit_engine.observe.units import counted
from fastvit_engine.shown import recorded, say

_FILE = "labelling.json"  # of what was asked for, until all shards are complete
_HARD = "cls"
_READING = ("eval_crop", "eval_transform", "image_key", "max_pixels")  # settings of section `data`
_RECORDED = ("source", "weights")  # arguments that have fields of their own in dataset.json

Images = Sequence[NDArray[np.uint8]]  # [S, S, 3]


class Teacher(NamedTuple):
    """A model that labels images."""

    name: str  # as it was given
    weights: str  # a hash of them, by which a run that resumes knows the teacher again
    class_names: Sequence[str]
    # (images, their names for errors, K) -> the K most probable classes, int64 [B, K], and their probabilities
    classify: Callable[[Images, Sequence[str], int], tuple[NDArray[np.int64], NDArray[np.float32]]]


def label_shards(
    source: str,
    out: AnyPath | str,
    teacher: Teacher,
    config: Config,
    *,
    hard: bool = False,
    top: int = MOST_IN_A_BLOCK,
    threshold: float | None = None,
    max_failed: float = 0.0,
    batch_size: int = 64,
    workers: int | None = None,
    part: tuple[int, int] = (1, 1),
    progress: Callable[[str], None] = say,
) -> MadeDataset:
    """Writes the samples of the training shards `source` to as many shards in `out`, labelled by `teacher`.

    Images and other members keep their bytes, and samples their keys and order; `cls` becomes the most probable class.
    Unless `hard`, the member `soft.npy` has the `top` most probable classes (see `soft_labels`). Images whose most
    probable class has less than `threshold` are left out, and counted in dataset.json. `config` says how images are
    read and cropped, as for evaluation. Labels of the source are not read.

    After a kill the same call keeps the shards that are complete. `part` (i, n) writes every n-th shard from the i-th;
    the part that completes the last one writes dataset.json. `workers` threads decode images.

    Raises UserError for bad arguments, shards that cannot be read, images that cannot be decoded (more than the
    fraction `max_failed`), a teacher whose weights are not those that labelled the first shards, and failed writes.
    """
    _check_arguments(len(teacher.class_names), hard, top, threshold, max_failed, batch_size, workers, part)
    arguments: dict[str, Any] = {
        "source": source,
        "weights": teacher.weights,
        "hard": hard,
        "top": None if hard else min(top, len(teacher.class_names)),
        "threshold": threshold,
        "image_size": config.model.image_size,
        "set": [f"data.{key}={getattr(config.data, key)}" for key in _READING],
    }
    path = any_path(out) if isinstance(out, str) else out
    with open_output(path) as output:
        made = read_info(str(path))
        if made is not None:
            _check_labelled_alike(path, made, arguments)
            output.finish()
            progress(f"{path} is already labelled: {made.train.samples:,} train samples")
            return MadeDataset(path, made)
        return _label(output, teacher, config, arguments, part, max_failed, batch_size, workers, progress)


def _check_arguments(
    classes: int,
    hard: bool,
    top: int,
    threshold: float | None,
    max_failed: float,
    batch_size: int,
    workers: int | None,
    part: tuple[int, int],
) -> None:
    if hard and top != MOST_IN_A_BLOCK:
        raise UserError("--hard writes one class, and --top says how many have probabilities: leave out one of them")
    if threshold is not None and not 1 / classes < threshold <= 1:
        raise UserError(
            f"--threshold is {threshold:g}: the most probable of {classes:,} classes always has {1 / classes:.2g}, so "
            "it must be above that, and at most 1"
        )
    if not 0 <= max_failed < 1:
        raise UserError(f"--max-failed is {max_failed}: it must be at least 0 and below 1")
    if not 1 <= part[0] <= part[1]:
        raise UserError(f"--part is {part[0]}/{part[1]}: it must be between 1/{part[1]} and {part[1]}/{part[1]}")
    for name, value in (("--top", top), ("--batch-size", batch_size), ("--workers", workers)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1")


def _check_labelled_alike(out: AnyPath, made: DatasetInfo, arguments: dict[str, Any]) -> None:
    if made.teacher is None:
        raise UserError(f"{out} has shards that were not labelled by `fastvit data label`: choose another --out")
    before = {"source": made.source, "weights": made.teacher.weights} | made.options
    _check_same(out, "was", before, arguments)
    check_whole(out, made)


def _check_same(out: AnyPath, tense: str, before: dict[str, Any], arguments: dict[str, Any]) -> None:
    check_equal(out, tense, before, {name: value for name, value in arguments.items() if name != "weights"})
    if before["weights"] != arguments["weights"]:
        raise UserError(
            f"shards of {out} were labelled by a model with other weights: name that one, such as the checkpoint of "
            "the run, or remove the folder and label all again"
        )


def _label(
    output: Output,
    teacher: Teacher,
    config: Config,
    arguments: dict[str, Any],
    part: tuple[int, int],
    max_failed: float,
    batch_size: int,
    workers: int | None,
    progress: Callable[[str], None],
) -> MadeDataset:
    """Begins or resumes; removes what it began if no shard was completed."""
    out, display = output.path, WorkProgress()
    existed, begun = output.exists(), output.is_begun()
    if existed and not begun and not output.is_empty():
        raise UserError(f"{out} is not empty and was not made by `fastvit data label`: choose another --out")
    notes: list[str] = []
    shards = list_shards([arguments["source"]], "train", named="--data", notes=notes)
    info = info_beside(shards)
    for note in notes:
        progress(f"note: {note}")
    try:
        output.begin()
        stored = _stored(output, {"arguments": arguments, "shards": recorded(shards)})
        _check_same(out, "is being", stored["arguments"], arguments)
        if stored["shards"] != recorded(shards):
            raise UserError(
                f"{arguments['source']} has other shards than when {out} was begun: restore them, or remove the "
                "folder and label all again"
            )
        names = {f"train-{number:06d}.tar": shard for number, shard in enumerate(shards)}
        mine = list(names)[part[0] - 1 :: part[1]]
        done = complete_shards(output, mine)
        if done:
            progress(f"{out}: {len(done):,} of {len(mine):,} shards are complete, labelling the others")
        total = _total(info, [names[name] for name in mine])
        failures = Failures(max_failed, total)
        for receipt in done.values():
            failures.done.add(_seen(receipt))
            failures.failed.add(len(receipt.failed))
        display.start("labelling", total, "images")
        with (
            output.temporary_folder(f"part-{part[0]}-of-{part[1]}") as temporary,
            ThreadPoolExecutor(workers or default_workers()) as pool,
        ):
            labeller = _Labeller(teacher, config, arguments, batch_size, pool, failures, display)
            for name in mine:
                if name not in done:
                    labeller.write(output, name, names[name], temporary)
        display.clear()
        return _finish(output, list(names), teacher, arguments, info, part, progress)
    except Exception as error:
        if part == (1, 1) and not begun and output.is_begun() and not output.receipts():
            output.abandon(remove_folder=not existed)
        if isinstance(error, OSError):
            raise UserError(f"cannot write to {out} ({reason_of(error)}): {advice_for(output, error)}") from error
        raise
    finally:
        display.clear()


def _stored(output: Output, wanted: dict[str, Any]) -> dict[str, Any]:
    """What the run that began the folder was asked for; `wanted`, which is stored, if this one begins it."""
    folder = output.stored_packing()
    if folder is None:

        def write(new: Path) -> None:
            (new / _FILE).write_text(json.dumps(wanted))

        folder = output.save_packing(write)
    if not (folder / _FILE).exists():
        raise UserError(f"{output.path} is being made by `fastvit data make`: choose another --out")
    found: dict[str, Any] = json.loads((folder / _FILE).read_text())
    return found


def _total(info: DatasetInfo | None, shards: Iterable[str]) -> int | None:
    """How many samples the shards hold, by the dataset.json beside them; None if it does not say."""
    counts = {} if info is None else info.train.shards | info.eval.shards
    found = [counts.get(shard.rpartition("/")[2]) for shard in shards]
    known = [count for count in found if count is not None]
    return sum(known) if len(known) == len(found) else None


def _seen(receipt: Receipt) -> int:
    """How many samples of the source a shard was made of."""
    return receipt.samples + len(receipt.failed) + int((receipt.counted or {}).get("unsure", 0))


class _Labeller:
    """Writes shards, one at a time; while the teacher looks at a batch, threads decode the next one."""

    def __init__(
        self,
        teacher: Teacher,
        config: Config,
        arguments: dict[str, Any],
        batch_size: int,
        pool: ThreadPoolExecutor,
        failures: Failures,
        display: WorkProgress,
    ) -> None:
        self.teacher, self.config, self.batch_size, self.pool = teacher, config, batch_size, pool
        self.top, self.threshold = arguments["top"], arguments["threshold"]
        self.keys, self.failures, self.display = SampleKeys.of(config.data), failures, display

    def write(self, output: Output, name: str, source: str, temporary: Path) -> None:
        """Writes a shard and its receipt. Raises OSError, or UserError as `label_shards`."""
        failed: list[list[str]] = []
        tally = {"unsure": 0.0, "held": 0.0, "least_held": 1.0}
        with closing(self._labelled(source, failed, tally)) as samples:
            receipt = write_shard(output, name, temporary, samples)
        store_receipt(output, name, receipt._replace(failed=failed, counted=tally), temporary)

    def _labelled(
        self, source: str, failed: list[list[str]], tally: dict[str, float]
    ) -> Generator[dict[str, Any], None, None]:
        """The samples to write. Those that fail are added to `failed`, by name and reason, and others to `tally`."""
        for samples, images in self._decoded(source):
            usable: list[tuple[Sample, NDArray[np.uint8]]] = []
            for sample, future in zip(samples, images, strict=True):
                try:
                    usable.append((sample, future.result()))
                except Unusable as problem:
                    failed.append([name_of(sample), problem.reason])
                    self.failures.add(*failed[-1])
            if usable:
                yield from self._with_labels([one for one, _ in usable], [image for _, image in usable], tally)
            self.failures.done.add(len(samples))
            self.display.update(self.failures.done.value)

    def _decoded(self, source: str) -> Iterator[tuple[list[Sample], list[Future[NDArray[np.uint8]]]]]:
        """The samples of a shard in batches, with their images; one batch is being decoded beside that given out."""
        samples = read_shard(source)
        ahead: deque[tuple[list[Sample], list[Future[NDArray[np.uint8]]]]] = deque()
        while batch := list(islice(samples, self.batch_size)):
            ahead.append((batch, [self.pool.submit(self._image, sample) for sample in batch]))
            if len(ahead) > 1:
                yield ahead.popleft()
        yield from ahead

    def _image(self, sample: Sample) -> NDArray[np.uint8]:
        return read_image(sample, self.keys, partial(eval_image, config=self.config))

    def _with_labels(self, samples: list[Sample], images: Images, tally: dict[str, float]) -> Iterator[dict[str, Any]]:
        num_classes = len(self.teacher.class_names)
        names = [sample["__key__"] for sample in samples]
        classes, probabilities = self.teacher.classify(images, names, self.top or 1)
        for sample, best, shares in zip(samples, classes, probabilities, strict=True):
            if self.threshold is not None and shares[0] < self.threshold:
                tally["unsure"] += 1
                continue
            members = {name: content for name, content in sample.items() if name not in ("__url__", SOFT_MEMBER)}
            members[_HARD] = str(best[0]).encode()
            if self.top is not None:
                held = float(min(1.0, shares.sum(dtype=np.float64))) if len(shares) < num_classes else 1.0
                tally["held"] += held
                tally["least_held"] = min(tally["least_held"], held)
                members[SOFT_MEMBER] = format_soft_label(best, shares, num_classes)
            yield members


def _finish(
    output: Output,
    names: Sequence[str],
    teacher: Teacher,
    arguments: dict[str, Any],
    source: DatasetInfo | None,
    part: tuple[int, int],
    progress: Callable[[str], None],
) -> MadeDataset:
    """Writes dataset.json if all shards are complete."""
    out, complete = output.path, complete_shards(output, names)
    if len(complete) < len(names):
        made = read_info(str(out))  # another part may have finished it in the meantime, and removed the receipts
        if made is None:
            left = len(names) - len(complete)
            progress(f"{out}: part {part[0]} of {part[1]} is complete, {left:,} shards are left to other parts")
        return MadeDataset(out, made)
    kept = {name: receipt.samples for name, receipt in complete.items() if receipt.samples}
    samples, failed = sum(kept.values()), [entry for receipt in complete.values() for entry in receipt.failed]
    tallies = [receipt.counted or {} for receipt in complete.values()]
    unsure = int(sum(tally["unsure"] for tally in tallies))
    threshold = arguments["threshold"]
    left_out = {f"most probable class below {threshold:g}": unsure} if unsure else {}
    left_out |= {"image that failed": len(failed)} if failed else {}
    if not samples:
        output.abandon(remove_folder=True)
        raise UserError(
            f"no image of {arguments['source']} is left, of {counted(unsure + len(failed), 'image')}: "
            + (f"lower --threshold {threshold:g}" if unsure else "repair them")
        )
    info = DatasetInfo(
        classes=list(teacher.class_names),
        source=recorded(arguments["source"]),
        seed=0 if source is None else source.seed,
        eval_fraction=None,
        samples_per_shard=max(map(_seen, complete.values())),
        options={name: recorded(value) for name, value in arguments.items() if name not in _RECORDED},
        failed=len(failed),
        left_out=left_out,
        teacher=TeacherInfo(
            model=recorded(teacher.name),
            weights=teacher.weights,
            kind="hard" if arguments["hard"] else "soft",
            held=None if arguments["hard"] else math.fsum(tally["held"] for tally in tallies) / samples,
            least_held=None if arguments["hard"] else min(tally["least_held"] for tally in tallies),
        ),
        train=SplitInfo(samples=samples, shards=kept),
        eval=SplitInfo(samples=0, shards={}),
    )
    if failed:
        output.write(FAILED_NAME, json_lines(recorded({"image": where, "reason": why}) for where, why in failed))
    index = write_index([str(out / name) for name in kept], out / INDEX_NAME, records=records_of(out, complete))
    output.write(INFO_NAME, (info.model_dump_json(indent=2) + "\n").encode())
    output.finish()
    progress(_summary(out, info, index))
    return MadeDataset(out, info)


def _summary(out: AnyPath, info: DatasetInfo, index: Index) -> str:
    assert info.teacher is not None
    teacher, counts = info.teacher, index.class_counts()
    fewest, most = min(counts.values()), max(counts.values())
    text = f"{out}: {counted(info.train.samples, 'train sample')} in {counted(len(info.train.shards), 'shard')}, of "
    text += f"{len(counts):,} of {len(info.classes):,} classes with {fewest:,} to {most:,} images each"
    if teacher.held is not None and teacher.least_held is not None:
        text += f"; the {info.options['top']} listed classes of an image hold {100 * teacher.held:.4g} % of the "
        text += f"probability on average, at least {100 * teacher.least_held:.4g} %"
    if info.left_out:
        text += f"; left out {describe_left_out(info.left_out)}"
    return text + (f"; {FAILED_NAME} names those that failed" if info.failed else "")
