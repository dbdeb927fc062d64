"""Finds the largest micro-batch that fits, in few tries."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tried:
    """A micro-batch that was tried. peak_bytes: most memory of any process; None if it does not fit."""

    micro_batch_size: int
    peak_bytes: int | None


def search(sizes: Sequence[int], first: int, peak_of: Callable[[int], int | None]) -> list[Tried]:
    """Every try, in order; the largest that fits is the answer, and there is none if none does.

    sizes: rising. first: of these, what is tried first; from there on, the middle of those that are not known to fit or
    not to. If a size fits, so is every smaller one taken to.
    """
    tried: list[Tried] = []
    fits, fails, at = -1, len(sizes), list(sizes).index(first)
    while fits + 1 < fails:
        tried.append(Tried(sizes[at], peak_of(sizes[at])))
        if tried[-1].peak_bytes is None:
            fails = at
        else:
            fits = at
        at = (fits + fails) // 2
    return tried


def largest_that_fits(tried: Sequence[Tried]) -> Tried | None:
    return max((each for each in tried if each.peak_bytes is not None), key=lambda t: t.micro_batch_size, default=None)
