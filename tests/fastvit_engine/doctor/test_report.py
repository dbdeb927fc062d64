"""The report: fits a terminal, says what is wrong last, and counts it."""

import json

import pytest

from fastvit_engine.doctor.findings import Group
from fastvit_engine.doctor.nodes import Shared
from fastvit_engine.doctor.report import as_json, as_text, problems

GROUPS = {name: Group(name) for name in ("software", "data", "GPUs")}
FOUND = [
    Shared(GROUPS["software"].problem("triton", "too old " * 20, "install another " * 10), ("a", "b")),
    Shared(GROUPS["data"].warning("store", "slow", "use a cache"), ("b",)),
    Shared(GROUPS["GPUs"].note("GPUs", "none", "take another node"), ("a", "b")),
    Shared(GROUPS["software"].ok("a subject that is longer than its column", "fine"), ("a", "b")),
]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_is_wider_than_the_terminal(width):
    assert max(map(len, as_text(FOUND, width).splitlines())) <= width


def test_what_is_wrong_comes_last_and_is_counted():
    text = as_text(FOUND, 80)
    places = [text.index(words) for words in ("software\n", "GPUs\n", "WARNINGS\n", "PROBLEMS\n", "1 problem, ")]
    assert places == sorted(places)
    assert text.endswith("1 problem, 1 warning, 1 note, 1 ok, on 2 nodes")
    assert "  store  b: slow\n         -> use a cache" in text
    assert problems(FOUND) == 1


def test_json_has_every_finding():
    content = json.loads(as_json(FOUND))
    assert (content["problems"], content["warnings"], content["hosts"]) == (1, 1, ["a", "b"])
    assert content["findings"][1] == {
        "group": "data",
        "subject": "store",
        "status": "warning",
        "found": "slow",
        "advice": "use a cache",
        "figures": {},
        "hosts": ["b"],
    }
