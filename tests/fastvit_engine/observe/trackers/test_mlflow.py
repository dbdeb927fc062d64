"""What MLflow has of a run, in a file without a server."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")


def test_two_starts_are_one_run_with_its_configuration_and_every_number(
    track: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    track("mlflow", 0, 4)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/b16/mlflow.db")
    experiment = client.get_experiment_by_name("vits").experiment_id
    (run,) = client.search_runs([experiment])
    assert (run.info.run_name, run.info.status) == ("b16", "KILLED")
    assert run.data.params == {"seed": "3", "train.global_batch_size": "32", "train.profile.steps": "None"}
    track("mlflow", 2, 6)
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FINISHED"
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted({(one.step, one.value) for one in losses}) == [(step, 2.0 / step) for step in range(1, 7)]
    assert run.data.metrics["eval/top1"] == 0.75 and run.data.metrics["fewshot/5-shot"] == 0.5
    assert any(math.isnan(one.value) for one in client.get_metric_history(run.info.run_id, "train/grad_norm"))
