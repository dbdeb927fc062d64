import time
from itertools import islice

import pytest

from fastvit_engine.config import Config
from fastvit_engine.data import prepare_data
from fastvit_engine.data.stream.batch import StageSeconds
from fastvit_engine.train.data_wait import DataWait


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("stage", "function"),
    [
        ("read", "fastvit_engine.data.stream.indexed.parse_sample"),
        ("decode", "fastvit_engine.data.stream.batch.open_image"),
        ("augment", "fastvit_engine.data.pixels.views.render"),
    ],
)
def test_an_artificially_slow_stage_is_named(stage, function, num_workers, digits, tmp_path, monkeypatch):
    config = Config.model_validate(
        {
            "model": {"name": "Ti/4", "image_size": 8, "num_classes": 10},
            "data": {"train": f"{digits}/train-*.tar", "num_workers": num_workers},
            "train": {"global_batch_size": 8},
        }
    )
    module, _, name = function.rpartition(".")
    fast = getattr(__import__(module, fromlist=[name]), name)

    def slow(*args):
        time.sleep(0.005)
        return fast(*args)

    plan = prepare_data(config, world_size=1, index_folder=tmp_path)
    monkeypatch.setattr(function, slow)  # workers are forked, and so slow too
    batches = plan.train_batches(config, rank=0, world_size=1, micro_batch_size=8, consumed=0, pin_memory=False)
    wait = DataWait(num_workers)
    for batch in islice(batches, 3):
        wait.add(batch.seconds)
    seconds = wait.take()
    assert sum(seconds) >= 3 * 8 * 0.005 and max(seconds) == getattr(seconds, stage)
    assert f"mostly for {stage}" in wait.warning(0.5, seconds)


def test_warning_says_what_to_do(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(16))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    seconds = StageSeconds(read=1, decode=6, augment=3)
    assert DataWait(2).warning(0.43, seconds) == (
        "training waited for data 43 % of the time, mostly for decode (read 10 %, decode 60 %, augment 30 %); "
        "first raise data.num_workers (2; cores per rank: 8); if that does not help, decoding is slow: make "
        "the shards again with smaller images; `fastvit data bench SHARDS --repack 256` measures what that brings"
    )
    assert "; first raise data.num_workers" in DataWait(2).warning(0.43, StageSeconds(6, 1, 3))
    assert "; first raise data.num_workers" in DataWait(7).warning(0.43, seconds)
    assert "; decoding is slow: " in DataWait(8).warning(0.43, seconds)
    assert "nearer to model.image_size" in DataWait(8).warning(0.43, StageSeconds(1, 3, 6))
    assert "; the storage is slow: " in DataWait(8).warning(0.43, StageSeconds(6, 1, 3))


def test_warns_once_and_not_of_little():
    wait, seconds = DataWait(2), StageSeconds(1, 1, 1)
    assert wait.warning(0.19, seconds) is None
    assert wait.warning(0.9, StageSeconds()) is None  # nothing was decoded since
    assert wait.warning(0.21, seconds) is not None
    assert wait.warning(0.9, seconds) is None


def test_laps_add_up():
    wait = DataWait(1)
    wait.add(StageSeconds(1, 2, 3))
    wait.add(StageSeconds(1, 0, 0.5))
    assert wait.take() == (2, 2, 3.5) and wait.take() == (0, 0, 0)
