import json
import re
from typing import Any

import numpy as np
import pytest

from fastvit_engine.observe.report.axes import Axes, Progress
from fastvit_engine.observe.report.chart import WHOLE, Mark, Series, envelope, smooth
from fastvit_engine.observe.report.chart import line_chart as chart


def series(values: list[float], name: str = "loss", **options: Any) -> Series:
    return Series(name, "train", np.arange(1, len(values) + 1, dtype=float), np.array(values, dtype=float), **options)


def line_chart(title: str, unit: str, lines: list[Series], **options: Any) -> str:
    """A chart over steps, up to the last one of the lines."""
    last = int(max((line.steps.max() for line in lines if len(line.steps)), default=1))
    return chart(title, unit, lines, Axes([Progress.of_run([], last, 64, 1e6)], [last]), **options)


def embedded(html: str) -> Any:
    """What a chart holds for the script."""
    (text,) = re.findall(r'<script type="application/json" class="data">(.*?)</script>', html)
    return json.loads(text)


def path(html: str, classes: str) -> list[tuple[float, float]]:
    """Corners of a line in a chart, in the SVG's coordinates (1000 x 1000, y downwards)."""
    (drawn,) = re.findall(rf'<path class="{classes}" d="([^"]*)"', html)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", drawn)]


def labels(html: str, side: str) -> list[str]:
    (block,) = re.findall(rf'<div class="{side}">(.*?)</div>', html)
    return re.findall(r">([^<]*)</span>", block)


def test_points_lie_where_the_axes_say() -> None:
    html = line_chart("Loss", "nats", [series([3.0, 2.0, 1.0, 0.0])])
    assert labels(html, "rows") == ["0", "1", "2", "3"]
    assert labels(html, "columns") == ["0", "1", "2", "3", "4"]
    assert path(html, "line train") == [
        (250, 0),
        (500, pytest.approx(333.3)),
        (750, pytest.approx(666.7)),
        (1000, 1000),
    ]
    assert html.count('class="point') == 4
    assert "loss at step 4: 0" in html


def test_gaps_where_there_is_no_value() -> None:
    html = line_chart("Loss", "", [series([1.0, 2.0, np.nan, np.inf, 2.0, 1.0])])
    (drawn,) = re.findall(r'<path class="line train" d="([^"]*)"', html)
    assert re.sub(r"[^ML]", "", drawn) == "MLML"


def test_nothing_recorded() -> None:
    assert "Not recorded" in line_chart("Gradient norm", "", [series([np.nan, np.nan])])
    assert "Not recorded" in line_chart("Gradient norm", "", [series([])])


@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-5, 1e9])
@pytest.mark.parametrize("from_zero", [False, True])
def test_one_value(value: float, from_zero: bool) -> None:
    html = line_chart("x", "", [series([value])], from_zero=from_zero)
    ((x, y),) = path(html, "line train")
    assert x == 1000 and 0 <= y <= 1000
    assert labels(html, "columns") == ["0", "1"]


def test_small_values_get_a_factor() -> None:
    html = line_chart("Learning rate", "", [series([0.0, 2e-4, 8e-4])], from_zero=True)
    assert labels(html, "rows") == ["0", "2", "4", "6", "8"]
    assert '<span class="unit">×10⁻⁴</span>' in html


def test_large_values_get_a_letter() -> None:
    line = Series("x", "train", np.array([0.0, 1_000_000.0]), np.array([0.0, 40_000.0]))
    html = line_chart("x", "", [line])
    assert labels(html, "rows") == ["0", "10k", "20k", "30k", "40k"]
    assert labels(html, "columns") == ["0", "0.2M", "0.4M", "0.6M", "0.8M", "1.0M"]


def test_a_spike_neither_flattens_the_rest_nor_goes_unsaid() -> None:
    values = [1.0 + 0.01 * (step % 10) for step in range(200)]
    values[100] = 1e5
    html = line_chart("Loss", "", [series(values, noisy=True)])
    assert "One value lies outside the drawn range: 1e+05." in html
    trend = np.array([y for _, y in path(html, "line train")])
    assert trend.std() < 100  # the smoothed line is not dragged along
    raw = np.array([y for _, y in path(html, "line train raw")])
    assert raw.min() == 0 and np.median(raw) > 300  # the spike lies on the edge


def test_long_lines_are_drawn_from_few_points() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    html = line_chart("Loss", "", [series(list(values), noisy=True)])
    assert len(html) < 60_000
    assert len(path(html, "line train raw")) <= 800


def test_many_lines_share_what_one_chart_may_hold_and_keep_their_spikes() -> None:
    """Forty runs of 10,000 steps, each with a spike of its own."""
    lines = []
    for number in range(40):
        values = np.zeros(10_000)
        values[100 * number + 7] = 1.0
        lines.append(series(list(values), name=f"run {number}"))
    html = line_chart("Loss", "", lines)
    assert len(html) < 300_000
    for line in embedded(html)["lines"]:
        assert len(line["x"]) <= 200
        assert max(line["y"]) == 1.0 and line["x"][line["y"].index(1.0)] % 100 == 8


def test_the_script_gets_the_values_and_nothing_ends_it_early() -> None:
    html = line_chart("Loss", "", [series([1.0, np.nan, 3.00001], name="</script><b>")], form=WHOLE)
    data = embedded(html)
    assert (data["low"], data["high"], data["form"]) == (1, 3.5, ["fixed", 0, ""])
    (line,) = data["lines"]
    assert (line["name"], line["x"], line["y"], line["trend"]) == ("</script><b>", [1, 2, 3], [1.0, None, 3.0], None)
    noisy = embedded(line_chart("Loss", "", [series([1.0, 2.0] * 20, noisy=True)]))["lines"][0]
    assert len(noisy["x"]) == 40 and len(noisy["trend"]["x"]) == len(noisy["trend"]["y"]) == 40


def test_lines_differ_by_their_dash() -> None:
    html = line_chart("Loss", "", [series([1.0, 2.0]), series([2.0, 3.0], dash=3)])
    assert '<path class="line train" ' in html and '<path class="line train dash-3" ' in html
    assert '<li class="train dash-3">' in html


def test_a_reader_who_sees_no_chart_hears_how_it_ends() -> None:
    html = line_chart("Loss", "", [series([2.0, 1.5]), series([3.0, np.nan], name="other")])
    assert 'role="img" aria-label="Loss over the training; at the end: loss 1.5, other 3"' in html


def test_envelope_keeps_extremes_order_and_gaps() -> None:
    steps = np.arange(100_000, dtype=float)
    values = np.sin(steps / 1000)
    values[777] = 50.0
    values[5000:6000] = np.nan
    few_steps, few_values = envelope(steps, values)
    assert len(few_steps) <= 800
    assert 777 in few_steps
    assert np.isnan(few_values).any()
    assert (np.diff(few_steps) > 0).all()
    np.testing.assert_array_equal(few_values, values[few_steps.astype(int)])


def test_smoothing_follows_a_straight_line_exactly_and_averages_noise() -> None:
    steps = np.arange(500, dtype=float)
    middles, fitted = smooth(steps, 3.0 - 0.01 * steps)
    assert len(middles) == 200
    assert fitted == pytest.approx(3.0 - 0.01 * middles, abs=1e-9)  # up to both ends
    noise = np.random.default_rng(0).normal(size=500)
    assert smooth(steps, noise)[1].std() < 0.35
    assert len(smooth(np.arange(100_000.0), np.arange(100_000.0))[0]) == 200


def test_names_are_escaped() -> None:
    html = line_chart("<i>", "<u>", [series([1.0, 2.0], name="<b>&", points=True)])
    assert "<i>" not in html and "<u>" not in html and "<b>&" not in html
    assert "&lt;b&gt;&amp;" in html


def test_marks_are_drawn_at_their_steps_and_counted_in_the_legend() -> None:
    marks = [Mark(5, "restart", 'at "5"'), Mark(5, "saved", "a", tick=True), Mark(99, "saved", "b", tick=True)]
    html = line_chart("Loss", "", [series([1.0] * 10)], marks=marks)
    assert '<path class="mark restart" data-step="5" d="M500.0 0V1000"><title>at &quot;5&quot;</title></path>' in html
    assert [float(left) for left in re.findall(r'class="mark saved" data-step="\d+" d="M([\d.]+) \d+V1000"', html)] == [
        500,
        1000,
    ]
    assert '<li class="mark saved">saved <b>2</b></li>' in html
    assert '"mark' not in line_chart("Loss", "", [series([1.0] * 10)])
