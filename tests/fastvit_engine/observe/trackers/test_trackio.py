"""What Trackio has of a run, on this machine."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("trackio", reason="trackio is not installed")


def test_two_starts_are_one_run_with_its_configuration_and_every_number(
    track: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    track("trackio", 0, 4)
    track("trackio", 2, 6)
    identity = json.loads((tmp_path / "b16" / "trackers.json").read_text())["id"]
    with sqlite3.connect(tmp_path / "trackio" / "vits.db") as database:
        found = database.execute("select run_id, run_name, step, metrics from metrics order by id").fetchall()
        (config,) = database.execute("select config from configs").fetchone()
    assert len({row[0] for row in found}) == 1 and {row[1] for row in found} == {f"b16-{identity[:6]}"}
    assert [row[2] for row in found] == [1, 2, 3, 4, 3, 4, 5, 6, 6, 6]
    numbers = [json.loads(row[3]) for row in found]
    assert numbers[0]["train/loss"] == 2.0 and numbers[-2]["eval/top1"] == 0.75
    assert numbers[-1]["fewshot/5-shot"] == 0.5
    assert json.loads(config)["seed"] == 3
