"""What TensorBoard is told of a run."""

import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.observe.trackers.tensorboard import TensorBoard
from tests.fastvit_engine.observe.conftest import eval_row, few_shot_row, train_row


@pytest.mark.parametrize("second", [1_800_000_000, 1_799_999_000], ids=["same second", "clock set back"])
def test_tensorboard_has_the_numbers_of_every_row_and_forgets_the_steps_of_a_dead_run(
    second: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.0)
    before = TensorBoard(run, 0)
    for step in range(1, 8):
        before.write(train_row(step))
    before.close()
    monkeypatch.setattr(time, "time", lambda: float(second))
    after = TensorBoard(run, 4)
    after.write(train_row(5, loss=99.0, mfu=None))
    after.write(eval_row(5, 0.75))
    after.write(few_shot_row(5, 0.25, 0.5, eval="fewshot_ema"))
    after.close()
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert losses == pytest.approx({1: 2.0, 2: 1.0, 3: 2 / 3, 4: 0.5, 5: 99.0})
    assert [event.step for event in events.Scalars("train/mfu")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("eval/top1")] == [0.75]
    assert [event.value for event in events.Scalars("fewshot_ema/5-shot")] == [0.5]
    assert [event.step for event in events.Scalars("fewshot_ema/1-shot")] == [5]
    assert "train/samples_hash" not in events.Tags()["scalars"]
