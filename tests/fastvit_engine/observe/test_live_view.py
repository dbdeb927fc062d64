"""The lines that a terminal shows of a run."""

import io
from datetime import UTC, datetime
from typing import Any, cast

import pytest

from fastvit_engine.observe.events import Event
from fastvit_engine.observe.live_view import LiveView, Position, curve_of
from tests.fastvit_engine.observe.conftest import train_row


class Stream(io.StringIO):
    encoding = "utf-8"


def event(kind: str, at: float = 0.0) -> Event:
    when = datetime.fromtimestamp(at, UTC).isoformat()
    return cast(Event, {"event": kind, "time": when, "message": "", "host": ""})


def lines(view: LiveView) -> list[str]:
    return view.lines(Position(5, 10, 30.0), 100)


def test_incidents_are_counted_and_the_last_save_is_told() -> None:
    view = LiveView(Stream(), clock=lambda: 1000.0)
    for one in (
        event("checkpoint", 100.0),
        event("checkpoint", 820.0),
        event("rewind"),
        event("rewind"),
        event("start"),
    ):
        view.add_event(one)
    view.add_event(event("slow_rank"))
    assert lines(view)[1:] == ["saved 3 min 0 s ago  2 rewinds  1 slow rank"]


def test_a_time_that_is_no_time_and_one_in_the_future_do_no_harm() -> None:
    view = LiveView(Stream(), clock=lambda: 1000.0)
    view.add_event(cast(Event, {"event": "checkpoint", "time": "yesterday", "message": "", "host": ""}))
    assert len(lines(view)) == 1
    view.add_event(event("checkpoint", 5000.0))
    assert lines(view)[1:] == ["saved 0.0 s ago"]


@pytest.mark.parametrize(
    ("values", "curve"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], "▁▂▃▄▅▆▇█"),
        ([3.0, 3.0], "▁▁"),
        ([2.0, float("nan"), 1.0, float("inf")], "█!▁!"),
        ([float("nan")], "!"),
        ([], ""),
    ],
)
def test_the_curve_of_the_loss(values: list[float], curve: str) -> None:
    assert curve_of(values) == curve


def test_the_curve_is_of_the_last_thirty_rows() -> None:
    view = LiveView(Stream())
    for step in range(1, 100):
        view.add(train_row(step))
    (curve,) = [part for part in lines(view)[1].split("  ") if set(part) <= set("▁▂▃▄▅▆▇█")]
    assert len(curve) == 30


@pytest.mark.parametrize("row", [{"loss": float("nan"), "grad_norm": float("inf")}, {"grad_norm": None, "epoch": None}])
def test_rows_without_some_figures_are_shown(row: dict[str, Any]) -> None:
    view = LiveView(Stream())
    view.add(train_row(1, **row))
    assert lines(view)[1].startswith("loss ")
