"""The end of a benchmark: record, report and pictures in a folder, and the report on the screen."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastvit_engine.files import atomic_write

Record = Mapping[str, Any]


def publish(
    record: Record,
    folder: Path,
    name: str,
    report: Callable[[Record], str],
    draw: Callable[[Record, Path], object] | None = None,
) -> None:
    """Writes NAME.json, NAME.md (what `report` says) and what `draw` draws into `folder`, and prints the report."""
    text = report(record)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / f"{name}.json", json.dumps(record, indent=1) + "\n")
    atomic_write(folder / f"{name}.md", text)
    if draw is not None:
        draw(record, folder)
    print(text)
