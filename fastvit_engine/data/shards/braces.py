"""Brace patterns such as "train-{000..899}.tar", expanded only if they do not name more files than any data set has."""

import itertools
import math
import re

from braceexpand import braceexpand

MOST_NAMES = 1_000_000
_LONGEST = 10_000  # characters
_RANGE = re.compile(r"(-?[0-9]+)\.\.(-?[0-9]+)(?:\.\.-?([0-9]+))?")


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern stands for, in its order.

    Raises ValueError if its braces do not match, or if it names more than MOST_NAMES.
    """
    if "{" not in pattern and "}" not in pattern:
        return list(braceexpand(pattern))
    try:
        if len(pattern) > _LONGEST:
            raise ValueError(f"a pattern of {len(pattern):,} characters is too long")
        if (count := _count(pattern)) > MOST_NAMES:
            names = f"{count:,}" if count < 10**15 else f"more than {10**15:,}"
            raise ValueError(f"it names {names} files, and {MOST_NAMES:,} are allowed")
        return list(itertools.islice(braceexpand(pattern), MOST_NAMES))
    except RecursionError:
        raise ValueError("the braces are nested too deeply") from None


def _count(pattern: str) -> int:
    """How many names braceexpand would make, without making them: it builds the parts of a pattern as whole lists."""
    return math.prod(_count_group(content) for content in _groups(pattern))


def _count_group(content: str) -> int:
    """The alternatives of a pair of braces that holds `content`."""
    if match := _RANGE.fullmatch(content):
        if max(map(len, match.groups(default=""))) > 20:
            raise ValueError("the numbers of a range are too large")
        first, last, step = int(match[1]), int(match[2]), int(match[3] or 1) or 1
        return abs(last - first) // step + 1
    parts = _split(content)
    return _count(content) if len(parts) == 1 else sum(map(_count, parts))


def _groups(pattern: str) -> list[str]:
    """The contents of the outermost pairs of braces."""
    found, depth, start, escaped = [], 0, 0, False
    for at, character in enumerate(pattern):
        if escaped or character == "\\":
            escaped = not escaped
        elif character == "{":
            depth += 1
            start = at + 1 if depth == 1 else start
        elif character == "}":
            depth -= 1
            if depth == 0:
                found.append(pattern[start:at])
    return found


def _split(content: str) -> list[str]:
    """The parts between the commas that are within no further braces."""
    parts, depth, start, escaped = [], 0, 0, False
    for at, character in enumerate(content):
        if escaped or character == "\\":
            escaped = not escaped
        elif character in "{}":
            depth += 1 if character == "{" else -1
        elif character == "," and depth == 0:
            parts.append(content[start:at])
            start = at + 1
    return [*parts, content[start:]]
