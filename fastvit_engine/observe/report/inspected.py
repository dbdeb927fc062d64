"""The figures that `fastvit inspect` has left in a run folder, as the report shows them."""

import base64
from pathlib import Path
from typing import NamedTuple

from fastvit_engine.errors import UserError
from fastvit_engine.observe.run_folder import RunFolder

TITLES = {  # of the figures, by the names of their files
    "filters": "patch filters",
    "pos_embed": "position embeddings",
    "attention_distance": "attention distance",
    "rollout": "attention rollout",
}


class InspectedFigure(NamedTuple):
    """A figure for light pages and for dark ones."""

    title: str
    light: str  # data URLs of PNGs
    dark: str


def read_inspected(folder: RunFolder) -> list[InspectedFigure]:
    """Those that are there for both kinds of pages. Raises UserError if a file is no picture."""
    found = []
    for name, title in TITLES.items():
        light, dark = (folder.inspection / f"{name}{suffix}.png" for suffix in ("", "-dark"))
        if light.is_file() and dark.is_file():
            found.append(InspectedFigure(title, _png_url(light, folder), _png_url(dark, folder)))
    return found


def _png_url(path: Path, folder: RunFolder) -> str:
    content = path.read_bytes()
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        raise UserError(f"{folder.describe(path)} is not a PNG: remove it, or make it again with fastvit inspect")
    return "data:image/png;base64," + base64.b64encode(content).decode()
