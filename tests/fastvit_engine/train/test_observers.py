"""A run with trackers and a port: what is refused before it writes anything, and what a restart continues."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from fastvit_engine.cli import main
from tests.fastvit_engine.observe.test_prometheus import free_port
from tests.in_full import only_in_full

pytestmark = pytest.mark.distributed


def test_a_tracker_that_is_not_installed_is_refused_at_once(
    train_arguments: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(train_arguments(tmp_path / "run", "observe.trackers=[mlflow]")) == 2
    assert "pip install 'fastvit-engine[mlflow]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_taken_is_refused_before_anything_is_written(train_arguments: Any, tmp_path: Path) -> None:
    from tests.fastvit_engine.warm_ranks import exit_codes_of

    log = tmp_path / "log"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        arguments = train_arguments(tmp_path / "run", f"observe.prometheus_port={taken.getsockname()[1]}")
        assert exit_codes_of(arguments, 1, log) == [2]
    text = log.read_text()
    assert text.count("fastvit: error:") == 1 and "cannot be used for Prometheus" in text
    assert not (tmp_path / "run").exists()


@only_in_full
def test_a_restart_continues_the_run_of_a_tracker_and_does_not_change_training(
    train: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    alone = train(tmp_path / "alone")
    settings = ["observe.trackers=[tensorboard,wandb]", f"observe.prometheus_port={free_port()}"]
    run = train(tmp_path / "run", *settings, "train.duration=10 steps", "schedule.kind=constant")
    train(run, *settings, "schedule.kind=constant", resume="auto")
    identity = json.loads((run / "trackers.json").read_text())["id"]
    assert len(list(run.glob(f"wandb/offline-run-*-{identity}/run-{identity}.wandb"))) == 2
    assert (run / "tensorboard").is_dir() and not (alone / "trackers.json").exists()
