"""Mutations of small valid files, and the bounds within which every parser of them must end."""

import os
import resource
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from fastvit_engine.errors import UserError

EXAMPLES = 3_000 if os.environ.get("FASTVIT_TEST_FUZZ") == "all" else 60  # of each test
SECONDS = 5.0  # of CPU for one parse of a few kilobytes
MEMORY = 1 << 28  # bytes that one parse may use
ADDRESSES = 1 << 32  # and may ask for, used or not
T = TypeVar("T")

fuzz = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.generate, Phase.shrink),  # to explain a failure takes far longer than to find it
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)

_ALWAYS = [b"\0", b"\xff", b"\n", b"\0" * 512, b"\xff" * 8, b"9" * 30, b"-1", b"0", b"{", b"[" * 5000, b"]", b'"']


@st.composite
def mutated(draw: st.DrawFn, seeds: Sequence[bytes], dictionary: Sequence[bytes] = ()) -> bytes:
    """One of the seeds with up to four changes: flips, zeros, cuts, insertions, splices and words."""
    content = bytearray(draw(st.sampled_from(seeds)))
    words = st.one_of(st.sampled_from([*_ALWAYS, *dictionary]), st.binary(min_size=1, max_size=16))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        length = draw(st.sampled_from([1, 2, 8, 64, 512]))
        change = draw(st.sampled_from(["flip", "zero", "cut", "truncate", "insert", "overwrite", "repeat", "splice"]))
        if change == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "zero":
            content[at : at + length] = bytes(len(content[at : at + length]))
        elif change == "cut":
            del content[at : at + length]
        elif change == "truncate":
            del content[at:]
        elif change == "insert":
            content[at:at] = draw(words)
        elif change == "overwrite":
            word = draw(words)
            content[at : at + len(word)] = word
        elif change == "repeat":
            content[at:at] = content[at : at + length] * draw(st.sampled_from([1, 2, 100]))
        elif change == "splice":
            other = draw(st.sampled_from(seeds))
            start = draw(st.integers(0, len(other)))
            content[at : at + length] = other[start : start + length]
    return bytes(content[: 1 << 20])


@contextmanager
def bounded(memory: int = MEMORY, seconds: float = SECONDS) -> Iterator[None]:
    """Fails if the block takes too much time or memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    tracemalloc.start()
    began = time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESSES, hard))
    try:
        yield
        took, used = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        tracemalloc.stop()
    assert took < seconds, f"took {took:.1f} s"
    assert used < memory, f"took {used:,} bytes"


def read_or_refuse(
    parse: Callable[[], T], *errors: type[Exception], memory: int = MEMORY, seconds: float = SECONDS
) -> T | None:
    """What `parse` gives, None if it refuses with one sentence (a UserError, or one of `errors`); within the bounds."""
    with bounded(memory, seconds):
        try:
            return parse()
        except (UserError, *errors) as error:
            assert str(error) and "\n" not in str(error), repr(str(error))
            assert len(str(error)) < 5000
            return None
