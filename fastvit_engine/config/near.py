"""The nearest valid names for a name that does not exist, and how a sentence offers them."""

import difflib
from collections.abc import Iterable, Sequence


def near_names(name: str, valid: Sequence[str], *, most: int = 1, cutoff: float = 0.6) -> list[str]:
    """Up to `most` of the `valid` names that look like `name`, the nearest first."""
    return difflib.get_close_matches(name, valid, n=most, cutoff=cutoff)


def or_list(names: Iterable[str]) -> str:
    """Joins names for a sentence: "'a'", "'a' or 'b'", "'a', 'b' or 'c'"."""
    *others, last = [f"'{name}'" for name in names]
    return f"{', '.join(others)} or {last}" if others else last
