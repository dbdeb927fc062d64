import json

import pytest

from fastvit_engine.train.trial.remembered import Remembered
from fastvit_engine.train.trial.search import Tried

JOB = {"device": "H100", "processes": [8, 8], "config": {"train": {"precision": "bf16"}}}


def test_what_a_trial_found_is_there_for_the_same_job_alone(tmp_path):
    first = Remembered(tmp_path / "a" / "b", JOB)
    assert first.read() is None
    first.write(96, [Tried(64, 700), Tried(128, None), Tried(96, 900)])
    assert Remembered(tmp_path / "a" / "b", {**JOB}).read() == 96
    assert Remembered(tmp_path / "a" / "b", JOB | {"processes": [16, 8]}).read() is None
    assert json.loads(first.path.read_text())["peak_bytes"] == {"64": 700, "128": None, "96": 900}
    first.path.unlink()
    assert first.read() is None


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"micro_batch_size": 96}', '{"micro_batch_size": "96", "job": JOB}', "[" * 100_000]
)
def test_a_file_that_says_nothing_of_this_job_is_as_none(tmp_path, content):
    remembered = Remembered(tmp_path, JOB)
    remembered.path.write_text(content.replace("JOB", json.dumps(JOB)))
    assert remembered.read() is None
