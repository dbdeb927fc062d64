"""MLflow: the server that MLFLOW_TRACKING_URI names, otherwise `mlflow.db` in the run folder. Runs in `child` only."""

import os
import time
from collections.abc import Iterator
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from fastvit_engine.observe.trackers.child import TrackedRun

_TAG = "fastvit.run"  # whose value is the id of the run; MLflow chooses its own
_LONGEST_VALUE = 6000  # characters of a parameter
_AT_ONCE = 100  # parameters of a request


class _Run:
    def __init__(self, run: TrackedRun) -> None:
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{run.folder}/mlflow.db"))
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", run.project))
        found = self._client.search_runs([experiment], f"tags.`{_TAG}` = '{run.id}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, "RUNNING")
            return
        self._id = self._client.create_run(experiment, tags={_TAG: run.id}, run_name=run.name).info.run_id
        params = [Param(key, str(value)[:_LONGEST_VALUE]) for key, value in _flat(run.config)]
        for first in range(0, len(params), _AT_ONCE):
            self._client.log_batch(self._id, params=params[first : first + _AT_ONCE])

    def log(self, step: int, numbers: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(key, value, now, step) for key, value in numbers.items()])

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")

    def _experiment(self, name: str) -> str:
        if (found := self._client.get_experiment_by_name(name)) is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:  # another run has made it just now
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def open_run(run: TrackedRun) -> _Run:
    return _Run(run)
