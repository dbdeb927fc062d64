"""`fastvit data verify`: reads every sample of a set of shards and says what is wrong with them."""

import hashlib
import json
import statistics
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from fastvit_engine.config import Config
from fastvit_engine.data.build.encode import encode_for_shard
from fastvit_engine.data.build.parallel import Counter, Workers, check_workers, default_workers, parallel_map, some_of
from fastvit_engine.data.pixels.decode import if_decodes
from fastvit_engine.data.shards.archive import DamagedShard, read_shard
from fastvit_engine.data.shards.names import ShardSet, shard_set
from fastvit_engine.data.shards.sample import Ignored, Sample, describe_ignored
from fastvit_engine.data.shards.usable import MISSING, PLAUSIBLE_CLASSES, UNREADABLE, WRONG_LABEL, SampleKeys, judge
from fastvit_engine.errors import UserError
from fastvit_engine.observe.progress import WorkProgress
from fastvit_engine.observe.units import counted, format_bytes
from fastvit_engine.shown import public_url, recorded, shown

_EXAMPLES = 10  # that are kept of each finding
_DAMAGED_IMAGE = "damaged image"
_UNLISTED = "unlisted shard"

# What a training run would stop at, or be falsified by; all others are warnings.
ERRORS = (
    "missing shard",
    "damaged shard",
    "empty shard",
    "unreadable shard",
    "wrong sample count",
    MISSING,
    UNREADABLE,
    _DAMAGED_IMAGE,  # decodes, but not to its end
    WRONG_LABEL,
    "duplicate key",
)


@dataclass
class Finding:
    """How often one kind of fault was found, with the first examples."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(example)


@dataclass
class Verdict:
    """Everything that was found in a set of shards."""

    where: str
    shards: int
    samples: int
    bytes: int
    findings: dict[str, Finding]
    ignored: Ignored  # files that belong to no sample

    @property
    def errors(self) -> dict[str, Finding]:
        return {kind: finding for kind, finding in self.findings.items() if kind in ERRORS}

    @property
    def warnings(self) -> dict[str, Finding]:
        return {kind: finding for kind, finding in self.findings.items() if kind not in ERRORS}

    def to_json(self) -> str:
        groups = {"errors": self.errors, "warnings": self.warnings}
        content = {
            name: {kind: {"count": found.count, "examples": found.examples} for kind, found in group.items()}
            for name, group in groups.items()
        }
        totals = {"shards": self.shards, "samples": self.samples, "bytes": self.bytes, "ignored": self.ignored.total()}
        return json.dumps(recorded({"ok": not self.errors, **totals, **content}), indent=2)

    def report(self) -> str:
        lines = [
            f"{shown(self.where)}: {counted(self.shards, 'shard')}, {counted(self.samples, 'sample')}, "
            f"{format_bytes(self.bytes)}" + describe_ignored(self.ignored)
        ]
        for title, group in (("errors", self.errors), ("warnings", self.warnings)):
            if not group:
                lines += ["", f"no {title}"]
            for kind, finding in group.items():
                lines += ["", f"{title[:-1]}: {kind}, {finding.count:,} found"]
                lines += [f"  {shown(example)}" for example in finding.examples]
                if finding.count > len(finding.examples):
                    lines.append(f"  and {finding.count - len(finding.examples):,} more")
        return "\n".join(lines)


@dataclass
class Seen:
    """What a shard holds: 28 bytes per sample."""

    labels: np.ndarray  # int32 [n], the first label, -1 if there is no usable one
    keys: np.ndarray  # uint64 [n], hashes
    images: np.ndarray  # uint64 [n, 2], hashes of the content
    bytes: int
    findings: dict[str, Finding]
    ignored: Ignored


def verify_shards(
    argument: str,
    config: Config | None = None,
    *,
    num_classes: int | None = None,
    skew: float = 2.0,
    workers: Workers | None = None,
) -> Verdict:
    """Reads all samples of the shards that `argument` names, in parallel, with the keys of `config` (or the defaults).

    Labels are checked against `num_classes` (0: not at all), otherwise against dataset.json, otherwise for being
    plausible.

    A shard is *uneven* when it holds more than `skew` times the median number of samples, or less than its `skew`th
    part. It is *not shuffled* when some class has more than `skew * e + 6 * sqrt(e) + 6` of its samples, e being the
    number expected from the class's share of all samples: chance gives that practically never.
    """
    if skew <= 1:
        raise UserError(f"--skew is {skew}: it must be above 1")
    if num_classes is not None and num_classes < 0:
        raise UserError(f"--num-classes is {num_classes}: give the number of classes, or 0 if labels do not matter")
    shards = shard_set(argument)
    if num_classes is None and shards.class_names is not None:
        num_classes = len(shards.class_names)
    findings: dict[str, Finding] = {}
    present: list[int] = []
    for number, shard in enumerate(shards.shards):
        if shard in shards.missing:
            _add(findings, "missing shard", f"{shard}, which dataset.json lists, does not exist")
        else:
            present.append(number)
    for name in shards.unlisted:
        _add(
            findings,
            _UNLISTED,
            f"{name} is not in dataset.json: a folder is read without it, and a pattern such as train-*.tar with it",
        )
    check_workers(workers, some_of([shards.shards[number] for number in present]))
    keys = SampleKeys.of((config or Config()).data)
    bound = PLAUSIBLE_CLASSES if num_classes is None else num_classes
    seen = _look_at_all(shards, present, keys, bound, default_workers() if workers is None else workers)
    for number, part in seen.items():
        for kind, finding in part.findings.items():
            whole = findings.setdefault(kind, Finding())
            whole.count += finding.count
            whole.examples = [*whole.examples, *finding.examples][:_EXAMPLES]
        if not len(part.labels) and not part.findings:  # which training refuses; zeros in place of an archive, for one
            _add(findings, "empty shard", f"shard {shards.shards[number]} holds no samples")
        _compare_count(findings, shards, number, part)
    _find_duplicates(findings, shards, seen)
    _find_skew(findings, shards, seen, skew)
    return Verdict(
        where=argument,
        shards=len(seen),
        samples=sum(len(part.labels) for part in seen.values()),
        bytes=sum(part.bytes for part in seen.values()),
        findings=findings,
        ignored=sum((part.ignored for part in seen.values()), Ignored()),
    )


def _look_at_all(
    shards: ShardSet, numbers: list[int], keys: SampleKeys, num_classes: int, workers: Workers
) -> dict[int, Seen]:
    """What is in each shard, by its number."""
    images = Counter()
    line = WorkProgress()
    counts = (shards.info.train.shards | shards.info.eval.shards) if shards.info else {}
    expected = [counts.get(Path(shards.shards[number]).name) for number in numbers]
    known = [count for count in expected if count is not None]
    by_image = len(known) == len(numbers)
    line.start("verifying", sum(known) if by_image else len(numbers), "images" if by_image else "shards")
    seen: dict[int, Seen] = {}
    results = parallel_map(
        partial(_verify_numbered, shards.shards, keys, num_classes, images),
        numbers,
        workers=workers,
        while_waiting=lambda: line.update(images.value if by_image else len(seen)),
    )
    for number, part in results:
        seen[number] = part
    line.clear()
    return dict(sorted(seen.items()))


def _verify_numbered(shards: list[str], keys: SampleKeys, num_classes: int, images: Counter, number: int) -> Seen:
    return verify_shard(shards[number], keys, num_classes, images)


def verify_shard(shard: str, keys: SampleKeys, num_classes: int, images: Counter) -> Seen:
    """Reads one shard to its end, or to where it is damaged; counts up `images` as it goes."""
    warnings.simplefilter("ignore")  # Pillow's, about odd but readable images
    labels: list[int] = []
    key_hashes, digests = bytearray(), bytearray()
    size = 0
    findings: dict[str, Finding] = {}
    ignored = Ignored()
    try:
        for sample in read_shard(shard, ignored):
            where = f"{sample['__key__']} of {_name(shard)}"
            judged = judge(sample, keys, num_classes, partial(if_decodes, max_pixels=keys.max_pixels))
            for problem in judged.problems:
                _add(findings, problem.kind, f"{where} {problem}")
            labels.append(judged.labels[0] if judged.labels else -1)
            key_hashes += hashlib.blake2b(sample["__key__"].encode("utf-8", "surrogateescape"), digest_size=8).digest()
            image = _image(sample, keys)
            digests += hashlib.blake2b(image, digest_size=16).digest() if image is not None else bytes(16)
            size += len(image or b"")
            if judged.image is not None:
                try:
                    encode_for_shard(judged.image, max_pixels=keys.max_pixels)  # by Pillow, stricter than training
                except ValueError as error:
                    _add(findings, _DAMAGED_IMAGE, f"{where} {error}")
            images.add()
    except DamagedShard as error:
        _add(findings, "damaged shard", f"{str(error).rpartition(': ')[0]}, after {len(labels):,} whole samples")
    except UserError as error:
        _add(findings, "unreadable shard", str(error))
    return Seen(
        labels=np.array(labels, np.int32),
        keys=np.frombuffer(bytes(key_hashes), np.uint64),
        images=np.frombuffer(bytes(digests), np.uint64).reshape(-1, 2),
        bytes=size,
        findings=findings,
        ignored=ignored,
    )


def _image(sample: Sample, keys: SampleKeys) -> bytes | None:
    return next((sample[name] for name in keys.images if name in sample), None)


def _add(findings: dict[str, Finding], kind: str, example: str) -> None:
    findings.setdefault(kind, Finding()).add(example)


def _compare_count(findings: dict[str, Finding], shards: ShardSet, number: int, seen: Seen) -> None:
    name = Path(shards.shards[number]).name
    if shards.info is None or {"damaged shard", "unreadable shard"} & seen.findings.keys():
        return
    expected = (shards.info.train.shards | shards.info.eval.shards).get(name)
    if expected is not None and expected != len(seen.labels):
        _add(
            findings, "wrong sample count", f"{name} holds {len(seen.labels):,} samples, dataset.json says {expected:,}"
        )


def _find_duplicates(findings: dict[str, Finding], shards: ShardSet, seen: dict[int, Seen]) -> None:
    if not seen:
        return
    numbers = np.array(list(seen))
    ends = np.cumsum([len(part.labels) for part in seen.values()])
    keys = np.concatenate([part.keys for part in seen.values()])[:, None]
    images = np.concatenate([part.images for part in seen.values()])

    def locate(index: int) -> tuple[int, int]:
        """Returns (number of the shard, row in it)."""
        position = int(np.searchsorted(ends, index, side="right"))
        return int(numbers[position]), index - int(ends[position - 1] if position else 0)

    def describe(pair: tuple[int, int]) -> str:
        first, second = (locate(index) for index in pair)
        names = [
            f"{_key_at(shards.shards[shard], row)} of {_name(shards.shards[shard])}" for shard, row in (first, second)
        ]
        return " and ".join(names)

    for kind, hashes in (("duplicate key", keys), ("duplicate image", images)):
        for pair in _equal_rows(hashes):
            if kind == "duplicate image" and not images[pair[1]].any():
                continue  # samples without an image
            splits = {shards.splits[locate(index)[0]] for index in pair}
            named = "image in train and eval" if kind == "duplicate image" and len(splits) > 1 else kind
            finding = findings.setdefault(named, Finding())
            finding.count += 1
            if len(finding.examples) < _EXAMPLES:
                finding.examples.append(describe(pair))


def _equal_rows(hashes: np.ndarray) -> Iterator[tuple[int, int]]:
    """(index of an equal row before it, index) for every row of [N, C] that is not the first of its kind."""
    order = np.lexsort(hashes.T[::-1])  # stable: equal rows stay in order
    same = (hashes[order[1:]] == hashes[order[:-1]]).all(axis=1)
    for position in np.flatnonzero(same):
        yield int(order[position]), int(order[position + 1])


def _name(shard: str) -> str:
    """The file name of a shard, for people."""
    return Path(public_url(shard)).name


def _key_at(shard: str, row: int) -> str:
    sample: Sample = next(islice(read_shard(shard), row, None))
    return str(sample["__key__"])


def _find_skew(findings: dict[str, Finding], shards: ShardSet, seen: dict[int, Seen], skew: float) -> None:
    for split in dict.fromkeys(shards.splits):
        parts = {number: part for number, part in seen.items() if shards.splits[number] == split and len(part.labels)}
        if len(parts) < 2:
            continue
        median = statistics.median(len(part.labels) for part in parts.values())
        labels = np.concatenate([part.labels for part in parts.values()])
        share = np.bincount(labels + 1) / len(labels)  # of each class; entry 0 is for no label
        names = ["no label", *(shards.class_names or [])]
        for number, part in parts.items():
            name, size = _name(shards.shards[number]), len(part.labels)
            if not median / skew <= size <= median * skew:
                _add(findings, "uneven shard", f"{name} holds {size:,} samples, the median shard {median:,.0f}")
            expected = share * size
            count = np.bincount(part.labels + 1, minlength=len(share))
            excess = count - (skew * expected + 6 * np.sqrt(expected) + 6)
            worst = int(excess.argmax())
            if excess[worst] > 0:
                label = names[worst] if worst < len(names) else f"class {worst - 1}"
                _add(
                    findings,
                    "shard that is not shuffled",
                    f"{name} holds {count[worst]:,} samples of {label}, of which {expected[worst]:,.1f} were expected",
                )
