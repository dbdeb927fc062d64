import pytest

from fastvit_engine.config import Config
from fastvit_engine.data.stream.batch_split import BatchSplit, split_batch
from fastvit_engine.engine.build import deepspeed_config
from fastvit_engine.errors import UserError


def config(**sections):
    return Config.model_validate(sections)


def test_deepspeed_counts_with_the_largest_micro_batch():
    """100 images over 3 processes, at most 10 at a time: 34, 33 and 33 images in 4 passes."""
    given = config(train={"global_batch_size": 100, "micro_batch_size": 10})
    written = deepspeed_config(given, split_batch(given, 3))
    assert (written["train_micro_batch_size_per_gpu"], written["gradient_accumulation_steps"]) == (9, 4)
    assert "train_batch_size" not in written  # DeepSpeed's own product, 108


def test_expert_settings_go_over_ours_without_removing_the_rest():
    written = deepspeed_config(
        config(zero={"stage": 2}, deepspeed={"zero_optimization": {"reduce_bucket_size": 7}}), BatchSplit(8, 1, 2)
    )
    assert written["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 7}
    assert written["gradient_accumulation_steps"] == 2


@pytest.mark.parametrize(
    ("timer", "written"),
    [
        ({}, {"enabled": False}),
        ({"enabled": True}, {"enabled": True}),
        ({"synchronized": False}, {"enabled": False, "synchronized": False}),
    ],
)
def test_the_timer_that_waits_for_the_gpu_runs_only_if_asked_for(timer, written):
    given = config(zero={"stage": 1}, deepspeed={"timers": {"throughput": timer}} if timer else {})
    assert deepspeed_config(given, BatchSplit(8, 1, 2))["timers"] == {"throughput": written}


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
        deepspeed_config(config(**sections), BatchSplit(1, 1, 1))


@pytest.mark.parametrize(("limit", "written"), [(1.0, 1.0), (0.3, 0.3), (None, 1e30)])
def test_gradients_are_clipped_at_the_limit_of_the_configuration(limit, written):
    config = Config.model_validate({"train": {"grad_clip": limit}, "zero": {"stage": 1}})
    assert deepspeed_config(config, BatchSplit(8, 1, 8))["gradient_clipping"] == written


@pytest.mark.parametrize(
    ("precision", "stage", "added_in"), [("bf16", 1, "fp32"), ("bf16", 3, "fp32"), ("bf16", 0, None), ("fp32", 1, None)]
)
def test_gradients_of_low_precision_are_added_up_in_fp32(precision, stage, added_in):
    config = Config.model_validate({"train": {"precision": precision}, "zero": {"stage": stage}})
    written = deepspeed_config(config, BatchSplit(8, 1, 8))
    assert written.get("data_types", {}).get("grad_accum_dtype") == added_in
    assert written["bf16"]["enabled"] == (precision == "bf16")
