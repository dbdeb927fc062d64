"""How figures look, and how they are written: as PNG and SVG, for light and for dark pages. Needs matplotlib."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fastvit_engine.files import atomic_write

_DPI = 110


class Theme(NamedTuple):
    """The colours of a page."""

    suffix: str  # of file names
    page: str
    ink: str
    soft: str
    line: str
    series: tuple[str, ...]  # of lines, one after the other


# After Okabe and Ito 2008, for colour-blind people too: dark enough for a light page, light enough for a dark one.
_SERIES = ("#0072b2", "#c8590b", "#00795a", "#a3497b", "#62666e", "#8a6d00", "#5b3fb0", "#b3263a")
_SERIES_ON_DARK = ("#56b4e9", "#e69f00", "#2fbf93", "#d98cb8", "#a3a8b0", "#f0e442", "#a99af0", "#f08a94")

THEMES = (
    Theme("", "#fbfaf8", "#1b1d21", "#62666e", "#d5d1c9", _SERIES),
    Theme("-dark", "#16181c", "#e8e6e1", "#a3a8b0", "#3a3e45", _SERIES_ON_DARK),
)


def save(name: str, draw: Callable[[Theme], Any], folder: Path) -> list[Path]:
    """Writes the figure that `draw` returns for each theme: NAME.png, NAME.svg, NAME-dark.png, NAME-dark.svg."""
    paths = []
    for theme in THEMES:
        with styled(theme):
            drawn = draw(theme)
            for form in ("png", "svg"):
                content = io.BytesIO()
                drawn.savefig(content, format=form, dpi=_DPI, metadata={"Date": None} if form == "svg" else None)
                paths.append(folder / f"{name}{theme.suffix}.{form}")
                atomic_write(paths[-1], content.getvalue())
    return paths


@contextmanager
def styled(theme: Theme) -> Iterator[None]:
    import matplotlib

    style: dict[Any, Any] = {
        "figure.facecolor": theme.page,
        "axes.facecolor": theme.page,
        "savefig.facecolor": theme.page,
        "axes.edgecolor": theme.line,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": theme.ink,
        "axes.labelcolor": theme.soft,
        "xtick.color": theme.soft,
        "ytick.color": theme.soft,
        "font.size": 9,
        "svg.hashsalt": "fastvit",  # the same file for the same figures
    }
    with matplotlib.rc_context(style):
        yield


def canvas(size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def title_of(figure: Any, title: str, about: str, theme: Theme) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=theme.ink)
    figure.supxlabel(about, x=0.99, ha="right", fontsize=8, color=theme.soft)
