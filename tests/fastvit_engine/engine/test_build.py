import pytest

from fastvit_engine.config import Config
from fastvit_engine.engine.build import BatchSplit, deepspeed_config, split_batch
from fastvit_engine.errors import UserError


def config(**sections):
    return Config.model_validate(sections)


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world_size", "expected"),
    [
        (4096, None, 8, BatchSplit(512, 1)),
        (4096, 128, 8, BatchSplit(128, 4)),
        (4096, 128, 64, BatchSplit(64, 1)),  # never more than the process's share
        (96, 10, 2, BatchSplit(8, 6)),  # the largest divisor of 48 that is at most 10
    ],
)
def test_the_world_size_decides_the_split(global_batch, micro_batch, world_size, expected):
    train = {"global_batch_size": global_batch, "micro_batch_size": micro_batch}
    split = split_batch(config(train=train), world_size)
    assert split == expected
    assert split.micro_batch_size * split.accumulation_steps * world_size == global_batch


def test_a_batch_that_does_not_divide_over_the_processes_is_refused():
    with pytest.raises(UserError, match="global_batch_size = 100 does not divide over 3 processes"):
        split_batch(config(train={"global_batch_size": 100}), 3)


def test_expert_settings_go_over_ours_without_removing_the_rest():
    written = deepspeed_config(
        config(zero={"stage": 2}, deepspeed={"zero_optimization": {"reduce_bucket_size": 7}}), BatchSplit(4, 2)
    )
    assert written["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 7}
    assert written["gradient_accumulation_steps"] == 2


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"deepspeed": {"train_batch_size": 8}}, "set train.global_batch_size instead"),
        ({"deepspeed": {"zero_optimisation": {}}}, "did you mean 'deepspeed.zero_optimization'"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "set zero.stage instead"),
        ({"zero": {"stage": 0, "offload": "optimizer"}}, "zero.offload needs ZeRO"),
        ({"zero": {"stage": 2, "offload": "all"}}, "needs zero.stage = 3"),
    ],
)
def test_what_deepspeed_would_ignore_or_fail_on_is_refused(sections, message):
    with pytest.raises(UserError, match=message):
        deepspeed_config(config(**sections), BatchSplit(1, 1))
