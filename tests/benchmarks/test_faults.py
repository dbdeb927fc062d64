"""What `fastvit bench faults` makes of what it sees."""

import json
from argparse import Namespace

import pytest

from benchmarks.faults import Followed, Kill, Rows, Seen, gaps, judged, measure, report, useful_seconds
from fastvit_engine.data.build.make import make_dataset
from tests.fastvit_engine.conftest import TINY_RUN

CALM = Followed([Seen(step, step) for step in range(1, 11)], [])
# A step a second; killed after step 4, which is done again: step 5 comes four seconds late.
DISTURBED = Followed(
    [Seen(1, 1), Seen(2, 2), Seen(3, 3), Seen(4, 4), Seen(7, 4), Seen(8, 5), Seen(9, 6), Seen(10, 7)],
    [Kill(4.5, 1, 4)],
)


def test_a_step_that_is_done_again_counts_once():
    assert gaps(DISTURBED.rows) == [1] * 6
    assert useful_seconds(DISTURBED.rows, DISTURBED.kills) == 6
    assert useful_seconds(CALM.rows, []) == 9


def test_the_first_step_after_a_kill_counts_as_a_usual_one():
    rows = [Seen(1, 1), Seen(2, 2), Seen(3, 3), Seen(9, 4), Seen(10, 5)]
    assert useful_seconds(rows, [Kill(3.5, 0, 3)]) == 4
    assert useful_seconds(rows, []) == 9  # a step that really took so long


def test_what_a_kill_costs():
    found = judged(CALM, DISTURBED, starts=[0, 3])
    assert found["goodput"] == pytest.approx(6 / 9)
    (kill,) = found["kills"]
    assert (kill["steps_lost"], kill["resumed_at"]) == (1, 3)
    assert kill["seconds_to_new_step"] == pytest.approx(3.5)


def test_rows_are_read_as_they_come_also_when_a_restart_has_dropped_some(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = lambda step: json.dumps({"step": step, "samples_hash": "0"}) + "\n"  # noqa: E731
    reader = Rows(path)
    assert reader.new() == []
    path.write_text(line(1) + line(2) + line(3)[:5])
    assert reader.new() == [1, 2]
    path.write_text(line(1) + line(2) + line(3))
    assert reader.new() == [3]
    fresh = tmp_path / "fresh"
    fresh.write_text(line(1) + line(2))
    fresh.replace(path)
    assert reader.new() == []
    with open(path, "a") as file:
        file.write(line(3) + json.dumps({"step": 3, "eval": "eval"}) + "\n")
    assert reader.new() == [3]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_whose_processes_are_killed_has_the_record_of_one_in_peace(tmp_path):
    make_dataset("digits", tmp_path / "digits", eval_fraction=0.2, progress=lambda text: None)
    given = [f"data.train={tmp_path}/digits/train-*.tar", "train.duration=400 steps", "data.num_workers=1"]
    settings = [*TINY_RUN, *given]
    args = Namespace(recipe="quickstart", set=settings, minutes=None, every=2.0, processes=2, seed=0)
    said = []
    record = measure(args, tmp_path, said.append)
    assert record["record_equal"] and record["weights_equal"]
    assert record["steps"] == 400 and 0 < record["goodput"] <= 1.05
    assert len(record["kills"]) >= 1 and any("killed rank" in line for line in said)
    text = report(record)
    assert "equal to the bit" in text and "different" not in text
