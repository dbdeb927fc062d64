"""Soft labels in the members of a sample: a teacher's probabilities, in a NumPy array that every reader of .npy opens.

The member `soft.npy` is an array of rows (class uint32, probability float32). Each row but the last is a class with its
probability, the most probable first. The last one holds the number of all classes, and the probability of those
without a row together, which is taken to be spread evenly over them. With 47 classes it fills one block of a tar.
"""

import io
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SOFT_MEMBER = "soft.npy"
MOST_IN_A_BLOCK = 47  # classes; more take another 512 bytes of the shard

_ROW = np.dtype([("class", "<u4"), ("probability", "<f4")])
_TOLERANCE = 1e-3  # by which probabilities may miss a sum of 1
_PREFIX = 10  # bytes: magic, version, and the length of the header


class SoftLabel(NamedTuple):
    """A distribution over classes."""

    num_classes: int
    classes: NDArray[np.int64]  # [K], different ones
    probabilities: NDArray[np.float32]  # [K]
    rest: float  # probability of all other classes together

    @property
    def held(self) -> float:
        """The probability of the classes that are named. At most 1 - `held` is in the wrong place."""
        return 1 - self.rest

    def dense(self, num_classes: int) -> NDArray[np.float32]:
        """Probabilities of `num_classes` classes, at least its own number, with a sum of 1; the rest spread evenly."""
        others = self.num_classes - len(self.classes)
        found = np.zeros(num_classes, np.float32)
        found[: self.num_classes] = self.rest / others if others else 0.0
        found[self.classes] = self.probabilities
        return found / found.sum(dtype=np.float64).astype(np.float32)


def format_soft_label(classes: NDArray[np.int64], probabilities: NDArray[np.float32], num_classes: int) -> bytes:
    """The member for classes [K] of `num_classes` with their probabilities [K]; the rest is what misses a sum of 1."""
    rows = np.empty(len(classes) + 1, _ROW)
    rows["class"][:-1], rows["probability"][:-1] = classes, probabilities
    rest = 1 - probabilities.sum(dtype=np.float64) if len(classes) < num_classes else 0.0
    rows[-1] = (num_classes, max(0.0, rest))
    file = io.BytesIO()
    np.lib.format.write_array(file, rows, version=(1, 0), allow_pickle=False)
    return file.getvalue()


def parse_soft_label(content: bytes) -> SoftLabel:
    """The distribution in a member. Raises ValueError, which says what it is instead, if it is none."""
    begin = _PREFIX + int.from_bytes(content[_PREFIX - 2 : _PREFIX], "little")
    count = _count_of(content[:begin])
    if len(content) != begin + count * _ROW.itemsize:
        raise ValueError("are cut short, or have bytes after their end")
    rows = np.frombuffer(content, _ROW, count, begin)
    num_classes, rest = int(rows["class"][-1]), float(rows["probability"][-1])
    classes, probabilities = rows["class"][:-1].astype(np.int64), rows["probability"][:-1].astype(np.float32)
    if len(np.unique(classes)) < len(classes):
        raise ValueError("name a class twice")
    if classes.max() >= num_classes:
        raise ValueError(f"name class {classes.max()} of {num_classes} classes, whose numbers begin at 0")
    every = rows["probability"]
    if not ((every >= 0) & (every <= 1 + _TOLERANCE)).all():
        raise ValueError("have a probability that is not between 0 and 1")
    if abs(every.sum(dtype=np.float64) - 1) > _TOLERANCE:
        raise ValueError(f"have probabilities with a sum of {every.sum(dtype=np.float64):.4g}, not 1")
    if len(classes) == num_classes and rest > _TOLERANCE:
        raise ValueError(f"have a probability of {rest:.4g} for other classes, and there are none")
    return SoftLabel(num_classes, classes, probabilities, rest)


def soft_label_of(sample: Mapping[str, bytes]) -> SoftLabel | None:
    """The soft label of a sample, None if it has none. Raises ValueError as `parse_soft_label`."""
    content = sample.get(SOFT_MEMBER)
    return None if content is None else parse_soft_label(content)


@lru_cache(maxsize=64)
def _count_of(header: bytes) -> int:
    """The number of rows of an array with this header. Raises ValueError if it is not an array of such rows."""
    file = io.BytesIO(header)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except ValueError:
        raise ValueError("are no NumPy array") from None
    if dtype != _ROW or len(shape) != 1 or shape[0] < 2:
        raise ValueError(f"are an array {dtype} of shape {list(shape)}, not rows of class (u4) and probability (f4)")
    return shape[0]
