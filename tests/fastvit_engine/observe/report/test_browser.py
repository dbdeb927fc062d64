"""Both pages in a real browser: at the widths of a phone and a screen, in both themes, with and without JavaScript."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastvit_engine.observe.report.comparison import render_comparison
from fastvit_engine.observe.report.recorded_run import load_run
from fastvit_engine.observe.report.report import render
from tests.browser import CHROMIUM, Tab, chromium
from tests.fastvit_engine.observe.conftest import ENVIRONMENT, eval_row, few_shot_row, png_url, train_row
from tests.fastvit_engine.observe.report.test_report import CLASSES, INCIDENTS

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")

LONG = "a-name-that-is-much-longer-than-a-phone-is-wide-and-has-no-space-to-break-at-" * 2
PARTS = {"forward": 0.3, "backward": 0.5, "update": 0.1}


def a_run(folder: Path, **changes: Any) -> Any:
    """A run with everything that a report can show."""
    folder.mkdir()
    rows: list[Any] = [train_row(step, **PARTS, **changes) for step in range(10, 841, 10)]
    rows += [eval_row(step, 1 - 10 / step) for step in (420, 840)] + [eval_row(840, 0.9, eval="eval_ema")]
    rows += [few_shot_row(420, 0.1, 0.2, 0.3, 0.4), few_shot_row(840, 0.2, 0.4, 0.5, 0.6)]
    samples = [{"key": LONG, "label": 1, "image": png_url(8), "predictions": [[n, 0.2] for n in range(5)]}] * 48
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT | {"shards": f"data/{LONG}.tar"}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in INCIDENTS))
    (folder / "samples.json").write_text(json.dumps({"step": 840, "class_names": ["cat", LONG], "samples": samples}))
    (folder / "classes.json").write_text(json.dumps(CLASSES | {"class_names": ["cat", LONG, "owl"]}))
    return load_run(folder)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of the report of one run and of the comparison of nine: every colour, every dash."""
    folder = tmp_path_factory.mktemp("pages")
    names = ["short", LONG, *"abcdefg"]
    runs = [a_run(folder / str(number), loss=1.0 + number) for number in range(len(names))]
    settings = [{"optimizer.learning_rate": str(number), "data.train": LONG} for number in range(len(names))]
    contents = {"report": render(runs[0]), "comparison": render_comparison(runs, names, settings)}
    files = {name: folder / f"{name}.html" for name in contents}
    for name, content in contents.items():
        files[name].write_text(content)
        assert len(content) < 3_000_000
    return files


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("page", ["report", "comparison"])
def test_a_page_fits_every_width_and_reads_in_both_themes(tab: Tab, pages: dict[str, Path], page: str) -> None:
    for width in (375, 1280):
        for dark in (False, True):
            tab.open(pages[page], width, dark=dark)
            tab.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
            assert tab.problems == []
            assert not tab.scrolls_sideways(width)
            assert tab.low_contrasts("main") == [], (width, dark)
    assert tab.missing_pictures() == []


@pytest.mark.parametrize("page", ["report", "comparison"])
def test_without_javascript_charts_are_complete_and_nothing_offers_more(
    tab: Tab, pages: dict[str, Path], page: str
) -> None:
    drawn = "[...document.querySelectorAll('.canvas path.line')].map((line) => line.getAttribute('d'))"
    tab.open(pages[page], 1280)
    expected = tab.evaluate(drawn)
    assert tab.evaluate("document.querySelector('.axis-choice').checkVisibility()")
    tab.open(pages[page], 1280, script=False)
    assert tab.evaluate(drawn) == expected and all("L" in corners for corners in expected if corners.count("M") > 1)
    assert not tab.evaluate("document.querySelector('.axis-choice').checkVisibility()")
    assert tab.evaluate("document.querySelectorAll('[tabindex], [role=slider]').length") == 0


def test_values_are_shown_under_the_pointer_and_by_arrow_keys(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["report"], 1280)
    tab.evaluate("document.querySelector('.canvas').scrollIntoView({ block: 'center' })")
    area = tab.evaluate("(() => { const { x, y, width } = document.querySelector('.canvas').getBoundingClientRect();"
                        " return { x, y, width }; })()")  # fmt: skip
    box = "document.querySelector('.canvas .values').innerText.split(/\\s*\\n\\s*/)"
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=area["x"] + area["width"] / 2, y=area["y"] + 20)
    assert tab.evaluate(box) == ["step 420", "training", "1", "held-out", "0.1"]
    assert tab.evaluate("document.querySelector('.values').checkVisibility()")
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    assert not tab.evaluate("document.querySelector('.values').checkVisibility()")

    tab.evaluate("document.querySelector('.axis-choice input').focus()")
    tab.press("Tab")
    said = "document.activeElement.getAttribute('aria-valuetext')"
    assert tab.evaluate(said) == "step 840, training 1, held-out 0.1, held-out, EMA weights 0.1"
    tab.press("Home")
    assert tab.evaluate(said) == "step 10, training 1"
    tab.press("ArrowRight")
    assert tab.evaluate(box) == ["step 20", "training", "1"]
    tab.press("Escape")
    assert not tab.evaluate("document.querySelector('.values').checkVisibility()")
    assert tab.problems == []


@pytest.mark.parametrize("axis", ["samples", "hours", "flops"])
def test_the_script_draws_another_axis_as_python_does(tab: Tab, pages: dict[str, Path], axis: Any) -> None:
    """Up to a tenth of a thousandth of the width, and back to where it began."""
    positions = (
        "[...document.querySelectorAll('.canvas path:not(.grid)')].map((path) => path.getAttribute('d')"
        ".match(/[-\\d.]+/g).map(Number))"
    )
    labels = "[...document.querySelectorAll('.columns, .axis')].map((part) => part.textContent)"
    choose = "document.querySelector('.axis-choice [value={}]').click()"
    folder = pages["report"].parent
    other = folder / f"{axis}.html"
    other.write_text(render(load_run(folder / "0"), axis))
    tab.open(other, 1280)
    expected = tab.evaluate(positions), tab.evaluate(labels)
    tab.open(pages["report"], 1280)
    before = tab.evaluate(positions), tab.evaluate(labels)
    assert before[1] != expected[1]
    tab.evaluate(choose.format(axis))
    drawn = tab.evaluate(positions)
    assert [len(path) for path in drawn] == [len(path) for path in expected[0]]
    assert all(path == pytest.approx(wanted, abs=0.11) for path, wanted in zip(drawn, expected[0], strict=True))
    assert tab.evaluate(labels) == expected[1]
    tab.evaluate(choose.format("steps"))
    assert (tab.evaluate(positions), tab.evaluate(labels)) == before and tab.problems == []
