"""Checks that the shards can be reached, listed, located and read, and how fast; reads little and writes nothing."""

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from fastvit_engine.config import Config
from fastvit_engine.data.shards.archive import read_shard
from fastvit_engine.data.shards.braces import expand_braces
from fastvit_engine.data.shards.index import INDEX_SUFFIX, index_command, open_index
from fastvit_engine.data.shards.names import Split, find_shards, is_local
from fastvit_engine.data.shards.remote_path import any_path
from fastvit_engine.data.shards.sample import Sample
from fastvit_engine.data.stream.prepare import index_at_hand
from fastvit_engine.doctor.decoding import Needs, check_decoding, generated_samples
from fastvit_engine.doctor.findings import Finding, Group
from fastvit_engine.errors import UserError
from fastvit_engine.observe.units import counted, format_bytes
from fastvit_engine.shown import public_url
from fastvit_engine.storage import ShardStorage
from fastvit_engine.storage.http import HttpSource
from fastvit_engine.storage.local import local_path
from fastvit_engine.storage.remote import TryPolicy, describe
from fastvit_engine.storage.source import AttemptFailed, Denied, Missing, Refused
from fastvit_engine.storage.stores import is_store, open_store

_group = Group("data")
_ANSWER = 5.0  # seconds that a server may take
_READ_BYTES, _READ_SECONDS = 2**26, 5.0  # of the measurement of reading, at most
_RANGE = 2**22  # bytes
_SHARDS_READ = 16
_IMAGES = 256  # that are decoded, at most
_MAGIC = re.compile(r"[*?[]")


def check_data(config: Config, needs: Needs, *, classes_known: bool) -> Iterator[Finding]:
    """classes_known: whether labels of model.num_classes and more are wrong."""
    samples: Iterator[Sample] | None = None
    rate = None
    for number, source in enumerate(config.data.sources, start=1):
        which = f" {number}" if len(config.data.sources) > 1 else ""
        pattern = source.shards
        finding = check_reachable(f"training data{which}", pattern)
        yield finding
        if finding.advice:
            continue
        try:
            shards, found = _locate(pattern, "train", config, f"index{which}")
        except UserError as error:
            yield _group.refused(f"training shards{which}", error)
            continue
        yield _group.ok(f"training shards{which}", f"{counted(len(shards), 'shard')} in {public_url(pattern)}")
        yield from found
        if samples is None:
            with _refusals("reading") as refused:
                rate, finding = measure_reading(shards)
                yield finding
            yield from refused
            samples = islice(read_shard(shards[0]), _IMAGES)
    if config.data.eval:
        yield from _check_evaluation(config.data.eval, config)
    if samples is None:
        if config.data.sources:  # what cannot be read is said above
            return
        samples = generated_samples(_IMAGES)
    with _refusals("decoding") as refused:
        yield from check_decoding(
            config, samples, needs, rate, generated=not config.data.sources, classes_known=classes_known
        )
    yield from refused


def check_reachable(subject: str, pattern: str) -> Finding:
    """Asks the server or the disk of a pattern once."""
    first = next(iter(expand_braces(pattern)), pattern) if not pattern.startswith("@") else pattern
    shown = public_url(first)
    if first.startswith("pipe:"):
        return _group.ok(subject, "comes from a command, which is not run here")
    if (path := local_path(first.removeprefix("@"))) is not None:
        fixed = path if os.path.exists(path) else _MAGIC.split(path, maxsplit=1)[0]
        folder = Path(fixed if os.path.isdir(fixed) else os.path.dirname(fixed) or ".")
        if not os.access(folder, os.R_OK | os.X_OK):
            what = "cannot be read by this user" if folder.exists() else "does not exist on this node"
            return _group.problem(subject, f"{folder} {what}", "mount or copy it here, or correct the path")
        return _group.ok(subject, f"on this machine's disks, in {folder}")
    server = urlsplit(first).hostname or shown
    began = time.monotonic()
    try:
        _ask(first)
    except Missing as error:
        return _group.problem(subject, f"{server} does not have {shown}: {error}", "correct its name")
    except Denied as error:
        advice = "give this node the credentials, in the environment or the usual files: docs/data.md lists their names"
        return _group.problem(subject, f"{shown} lets nobody in with these credentials ({error})", advice)
    except Refused as error:
        reason, _, remedy = str(error).partition(": ")
        advice = remedy or "check its name, and this node's access to it"
        return _group.problem(subject, f"{server} does not serve {shown}: {reason}", advice)
    except AttemptFailed as error:
        advice = "check its name, the network of this node (DNS, proxy, firewall) and the server"
        return _group.problem(subject, f"{server} cannot be reached: {error}", advice)
    except UserError as error:
        return _group.refused(subject, error)
    seconds = time.monotonic() - began
    return _group.ok(subject, f"{server} answers in {1000 * seconds:.0f} ms", figures={"seconds": seconds})


def _ask(url: str) -> None:
    """One small request. Raises Refused, AttemptFailed, or UserError."""
    if url.startswith(("http://", "https://")):
        with HttpSource().open(url, 0, 1, _ANSWER):
            return
    if not is_store(url):
        open_store(url)  # which says what kinds there are
    store, key = open_store(url, timeout=_ANSWER, retries=0, patience=_ANSWER)
    with contextlib.suppress(Missing):  # of a name that is a folder or a pattern; listing says what is there
        store.head(key or "shards.index")


def _locate(pattern: str, split: Split, config: Config, subject: str) -> tuple[list[str], list[Finding]]:
    """The shards, and what is to be said of their index. Raises UserError."""
    with tempfile.TemporaryDirectory(prefix="fastvit-doctor-") as folder:
        if pattern.endswith(INDEX_SUFFIX):
            index = open_index(any_path(pattern), Path(folder), label_key=config.data.label_key)
            return index.shards, [_group.ok(subject, f"{counted(index.samples, 'sample')}")]
        shards = find_shards(pattern, split)
        if config.data.order == "stream":
            return shards, []
        found = index_at_hand(shards, config, Path(folder))
        if found is not None:
            return shards, [_group.ok(subject, f"{counted(found.samples, 'sample')}, by {found.where}")]
    out = "FILE.index"
    if all(map(is_local, shards)):
        advice = "nothing, as a run makes it when it starts; fastvit data index SHARDS makes it now"
        return shards, [_group.note(subject, "there is none yet beside the shards", advice)]
    advice = f"run `{index_command(out, config.data.label_key)}` and set data.index={out}, or set data.order=stream"
    return shards, [_group.problem(subject, "there is none beside the shards, which are not local", advice)]


def _check_evaluation(pattern: str, config: Config) -> Iterator[Finding]:
    finding = check_reachable("evaluation data", pattern)
    yield finding
    if finding.advice:
        return
    try:
        shards, found = _locate(pattern, "eval", config, "evaluation index")
    except UserError as error:
        yield _group.refused("evaluation shards", error)
        return
    yield _group.ok("evaluation shards", f"{counted(len(shards), 'shard')} in {public_url(pattern)}")
    yield from found


def measure_reading(shards: Sequence[str]) -> tuple[float | None, Finding]:
    """Bytes per second, of ranges of several shards as a data worker reads them; None if they cannot be so read."""
    if any(shard.startswith("pipe:") for shard in shards):
        return None, _group.ok("reading", "not measured: the shards come from a command")
    chosen = [shards[n] for n in np.unique(np.linspace(0, len(shards) - 1, _SHARDS_READ).astype(int))]
    policy = TryPolicy(retries=1, timeout=_ANSWER, patience=2 * _ANSWER)
    paths = [local_path(shard) for shard in chosen]
    sizes = [
        os.stat(path).st_size if path is not None else describe(shard, policy)[0]
        for shard, path in zip(chosen, paths, strict=True)
    ]
    for path in paths:
        _forget_pages(path)
    ranges = [
        (number, start, min(_RANGE, size - start))
        for start in range(0, _READ_BYTES, _RANGE)
        for number, size in enumerate(sizes)
        if start < size
    ][: _READ_BYTES // _RANGE]
    storage = ShardStorage(chosen, sizes, retries=policy.retries, timeout=policy.timeout, patience=policy.patience)
    began, read = time.perf_counter(), 0
    for content in storage.read_many(ranges):
        read += len(content)
        if (seconds := time.perf_counter() - began) > _READ_SECONDS:
            break
    rate = read / max(seconds, 1e-6)
    found = f"{format_bytes(rate)}/s by one process ({format_bytes(read)} of {counted(len(chosen), 'shard')})"
    return rate, _group.ok("reading", found, figures={"bytes_per_second": rate}, speed="bytes_per_second")


def _forget_pages(path: str | None) -> None:
    """Asks the kernel to drop a file from its page cache, so that the disk is what is measured."""
    if path is not None:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, _READ_BYTES, os.POSIX_FADV_DONTNEED)


class _Refusals(list[Finding]):
    """Findings of what was refused."""


@contextlib.contextmanager
def _refusals(subject: str) -> Iterator[_Refusals]:
    found = _Refusals()
    try:
        yield found
    except (UserError, OSError) as error:
        found.append(_group.refused(subject, error))
