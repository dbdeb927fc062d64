"""YAML from outside, in bounded time and memory: no deep nesting, and no values that aliases multiply without end.

libyaml's own composer overflows the stack on deep nesting, and aliases of aliases make billions of values out of a few
lines. Both show in the parser's events, which cost nothing, before anything is built.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

_Parser: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's if PyYAML was built with it
_LONGEST = 1 << 22  # characters
_DEEPEST = 50  # collections within each other
_MOST_VALUES = 100_000  # with those that aliases repeat


def read_yaml(path: Path) -> str:
    """The text of a file, or its beginning if `check_yaml` would refuse it. Raises OSError or UnicodeDecodeError."""
    with open(path, encoding="utf-8-sig") as file:
        return file.read(_LONGEST + 1)


@contextlib.contextmanager
def yaml_errors() -> Iterator[None]:
    """Turns what PyYAML lets out while it makes dates, numbers and tags into a yaml.YAMLError."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise yaml.YAMLError(f"a value cannot be read ({' '.join(str(error).split())[:200]})") from error


def check_yaml(text: str) -> None:
    """Raises yaml.YAMLError for a text that must not be given to a loader: it would take too much memory, or crash."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise yaml.YAMLError("it holds bytes that are no UTF-8 text") from error
    if len(text) > _LONGEST:
        raise yaml.YAMLError(f"it has more than {_LONGEST:,} characters")
    values: dict[str | None, int] = {}  # in the node of each anchor
    open_nodes: list[list[Any]] = []  # [anchor, values so far]
    for event in yaml.parse(text, Loader=_Parser):
        count = 0
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append([event.anchor, 1])
            if len(open_nodes) > _DEEPEST:
                raise _problem(event, f"more than {_DEEPEST} collections are nested in each other")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, count = open_nodes.pop()
            values[anchor] = count
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_nodes):
                raise _problem(event, f"the alias *{event.anchor} refers to what it is in")
            count = values.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            count = values[event.anchor] = 1
        if open_nodes:
            open_nodes[-1][1] += count
            if open_nodes[-1][1] > _MOST_VALUES:
                raise _problem(event, f"it holds more than {_MOST_VALUES:,} values, with those that aliases repeat")


def _problem(event: Any, problem: str) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
