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
from fastvit_engine.data.stream.prepare import index_at_hand
from fastvit_engine.doctor.decoding import Needs, check_decoding, generated_samples
from fastvit_engine.doctor.findings import Finding, Group, Status
from fastvit_engine.errors import UserError
from fastvit_engine.observe.units import counted, format_bytes
from fastvit_engine.shown import public_url
from fastvit_engine.storage import ShardStorage
from fastvit_engine.storage.http import HttpSource
from fastvit_engine.storage.local import local_path
from fastvit_engine.storage.remote import TryPolicy, describe
from fastvit_engine.storage.source import AttemptFailed, Denied, Missing, Refused
from fastvit_engine.storage.stores import is_store, open_store
from fastvit_engine.text import read_lines

_group = Group("data")
_ANSWER = 5.0  # seconds that a server may take
_READ_BYTES, _READ_SECONDS = 2**26, 5.0  # of the measurement of reading, at most
_RANGE = 2**22  # bytes
_SHARDS_READ = 16
_IMAGES = 256  # that are decoded, at most
_MAGIC = re.compile(r"[*?[]")


def check_data(config: Config, out: str, needs: Needs, *, classes_known: bool) -> Iterator[Finding]:
    """out: the run folder. classes_known: whether labels of model.num_classes and more are wrong."""
    for subject, place in (("run folder", out), ("checkpoints", config.checkpoint.path)):
        if place is not None and is_store(place):
            yield check_reachable(subject, place)
    several = len(config.data.sources) > 1
    patterns: list[tuple[str, str, Split]] = [
        (f"training data {number}" if several else "training data", source.shards, "train")
        for number, source in enumerate(config.data.sources, start=1)
    ]
    patterns += [("evaluation data", config.data.eval, "eval")] if config.data.eval else []
    located: dict[str, list[str]] = {}
    for subject, pattern, split in patterns:
        yield (finding := check_reachable(subject, pattern))
        if finding.status == Status.PROBLEM:
            continue
        with _refusals(subject.replace("data", "shards")) as refused:
            located[subject] = shards = _locate(pattern, split, config)
            yield _group.ok(
                subject.replace("data", "shards"), f"{counted(len(shards), 'shard')} in {public_url(pattern)}"
            )
        yield from refused
    training = [located[subject] for subject, _, split in patterns if split == "train" and subject in located]
    if training or not config.data.sources:  # what cannot be read is said above
        yield from _measure(config, training[0] if training else None, needs, classes_known=classes_known)
    for subject, pattern, _ in patterns:  # last: to fetch a large one may take longer than all the rest
        if subject in located and config.data.order != "stream":
            with _refusals(subject.replace("data", "index")) as refused:
                yield _check_index(subject.replace("data", "index"), pattern, located[subject], config)
            yield from refused


def _measure(config: Config, shards: list[str] | None, needs: Needs, *, classes_known: bool) -> Iterator[Finding]:
    """Reading and decoding, of these shards or of generated images."""
    rate = None
    if shards is not None:
        with _refusals("reading") as refused:
            rate, finding = measure_reading(shards)
            yield finding
        yield from refused
    samples = generated_samples(_IMAGES) if shards is None else islice(read_shard(shards[0]), _IMAGES)
    with _refusals("decoding") as refused:
        yield from check_decoding(config, samples, needs, rate, generated=shards is None, classes_known=classes_known)
    yield from refused


def check_reachable(subject: str, pattern: str) -> Finding:
    """Asks the server or the disk of a pattern once."""
    if pattern.startswith("@"):
        try:
            pattern = next(iter(read_lines(Path(pattern[1:]).expanduser())), "")
        except (OSError, UnicodeDecodeError) as error:
            return _group.problem(subject, f"the list {pattern[1:]} cannot be read ({error})", "correct its name")
    first = next(iter(expand_braces(pattern)), pattern)
    shown = public_url(first)
    if first.startswith("pipe:"):
        return _group.ok(subject, "comes from a command, which is not run here")
    if (path := local_path(first)) is not None:
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


def _locate(pattern: str, split: Split, config: Config) -> list[str]:
    """The shards that a pattern names. Raises UserError."""
    if pattern.endswith(INDEX_SUFFIX):
        with tempfile.TemporaryDirectory(prefix="fastvit-doctor-") as folder:
            return open_index(any_path(pattern), Path(folder), label_key=config.data.label_key).shards
    return find_shards(pattern, split)


def _check_index(subject: str, pattern: str, shards: list[str], config: Config) -> Finding:
    """Raises UserError if the index cannot be used that data.index names."""
    if pattern.endswith(INDEX_SUFFIX):
        return _group.ok(subject, f"{public_url(pattern)} is one")
    with tempfile.TemporaryDirectory(prefix="fastvit-doctor-") as folder:
        index = index_at_hand(shards, config, Path(folder))
        if index is not None:
            return _group.ok(subject, f"{counted(index.samples, 'sample')}, by {index.where}")
    if all(map(is_local, shards)):
        advice = "nothing, as a run makes it when it starts; fastvit data index SHARDS makes it now"
        return _group.note(subject, "there is none yet beside the shards", advice)
    command = index_command("FILE.index", config.data.label_key)
    advice = f"run `{command}` and set data.index=FILE.index, or set data.order=stream"
    return _group.problem(subject, "there is none beside the shards, which are not local", advice)


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


@contextlib.contextmanager
def _refusals(subject: str) -> Iterator[list[Finding]]:
    """A list that gets a problem of this subject if the block raises UserError or OSError."""
    found: list[Finding] = []
    try:
        yield found
    except (UserError, OSError) as error:
        found.append(_group.refused(subject, error))
