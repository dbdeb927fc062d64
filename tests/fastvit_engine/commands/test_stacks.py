"""`fastvit stacks` on a run that nobody works on. The traces of a run in progress: train/test_healing.py."""

import pytest

from fastvit_engine.cli import main
from fastvit_engine.observe.events import record_event
from fastvit_engine.observe.run_folder import RunFolder


def test_a_run_that_nobody_works_on_is_not_waited_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastvit_engine.distributed.stacks.collect_stacks", pytest.fail)
    run = RunFolder(tmp_path / "run")
    record_event(run, "start", "training begins", step=0, world_size=2)
    assert main(["stacks", str(run.path)]) == 2
    assert f"nobody works on {run}: it has no process whose stack traces" in capsys.readouterr().err
    assert not run.stacks.exists()
