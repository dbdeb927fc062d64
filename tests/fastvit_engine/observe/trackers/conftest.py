"""A run that a real tracker is told of."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.observe.trackers import process
from fastvit_engine.observe.trackers.choose import open_trackers
from tests.fastvit_engine.observe.conftest import eval_row, few_shot_row, train_row

CONFIG = {"seed": 3, "train": {"global_batch_size": 32, "profile": {"steps": None}}}


@pytest.fixture
def track(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int, int], None]:
    """track(library, start_step, last_step): a start of a run of 6 steps; the last also has its evaluations."""

    monkeypatch.setattr(process, "CLOSE_SECONDS", 120.0)  # of tests, which end before the library has started

    def start(library: str, start_step: int, last_step: int) -> None:
        run = RunFolder(tmp_path / "b16")
        run.path.mkdir(exist_ok=True)
        (tracker,) = open_trackers([library], run, "vits", CONFIG, start_step, 6)
        for step in range(start_step + 1, last_step + 1):
            tracker.write(train_row(step, grad_norm=float("nan") if step == 2 else 0.5))
        if last_step == 6:
            tracker.write(eval_row(6, 0.75))
            tracker.write(few_shot_row(6, 0.25, 0.5))
        tracker.close()

    return start
