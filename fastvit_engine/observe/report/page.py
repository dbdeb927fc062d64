"""What all pages share: template, style sheet and script in one file that fetches nothing."""

import base64
import hashlib
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

import fastvit_engine
from fastvit_engine.observe.report.axes import AXES, TITLES, Axes
from fastvit_engine.observe.report.chart import embedded
from fastvit_engine.observe.units import format_duration, format_share


class Section(NamedTuple):
    """Figures under a heading."""

    title: str
    note: str
    figures: list[Markup]


class Cell(NamedTuple):
    """A field of a table."""

    text: str
    best: bool = False
    style: str = ""  # class in the style sheet


class Table(NamedTuple):
    """Rows whose first cell names them. On a phone, each row is a block of its own."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""


def section(title: str, charts: Sequence[str], note: str = "") -> Section:
    """A section of charts; says so if there are none."""
    note = note.strip() if charts else "No step has been logged yet."
    return Section(title, note, [Markup(chart) for chart in charts])


def render_page(template: str, axes: Axes, **values: Any) -> str:
    """Fills a template of this folder. `values`: text, but for what is `Markup`."""
    script = _resource("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template(template)
        .render(
            style=Markup(_resource("style.css")),
            script=Markup(script),
            policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
            axes=Markup(embedded(axes.for_script(), "axes")),
            axis_choice=[(axis, TITLES[axis], axis == axes.shown) for axis in AXES],
            version=fastvit_engine.__version__,
            written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            **values,
        )
    )


@cache
def _environment() -> Environment:
    """Of the templates, which it compiles once."""
    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        loader=FunctionLoader(_resource),
    )
    environment.filters["percent"] = format_share
    environment.filters["thousands"] = "{:,}".format
    environment.filters["duration"] = _duration
    environment.filters["bar_width"] = lambda share: f"{100 * min(1.0, max(0.0, share)):.1f}"
    return environment


def _duration(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else format_duration(seconds)


def _resource(name: str) -> str:
    return (resources.files("fastvit_engine.observe.report") / name).read_text(encoding="utf-8")
