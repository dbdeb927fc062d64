"""What is refused because two values contradict each other, before anything is loaded."""

import pytest

from fastvit_engine.config import load_config
from fastvit_engine.errors import UserError


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.name=R50x1"], "model.name 'R50x1' is not a size and a patch size"),
        (["model.image_size=30"], "model.image_size 30 is not a multiple of the patch size 4"),
        (["model.heads=5"], "model.heads 5 does not divide model.width 64"),
        (["data.max_labels=3"], "data.max_labels is 3, and a softmax loss takes one label: set loss.kind=sigmoid"),
        (["train.duration=50%"], "train.duration = '50%' is a fraction of the run"),
        (["zero.stage=0", "zero.offload=optimizer"], "zero.offload needs ZeRO: set zero.stage to 1, 2 or 3"),
        (["zero.stage=2", "zero.offload=all"], "which needs zero.stage = 3"),
        (["checkpoint.keep_best=eval.top1", "data.eval=null"], "needs an evaluation: set data.eval"),
        (["checkpoint.keep_best=eval_ema.top1"], "needs an average of the weights: set ema.decay"),
    ],
)
def test_values_that_contradict_each_other(overrides, message):
    with pytest.raises(UserError) as error:
        load_config("quickstart", overrides)
    assert message in str(error.value)


def test_offloading_leaves_the_stage_to_the_engine():
    assert load_config("quickstart", ["zero.stage=auto", "zero.offload=all"]).config.zero.offload == "all"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.type=Lamb", "deepspeed.optimizer is written by the engine: set the 'optimizer' section instead"),
        ("bf16.enabled=true", "deepspeed.bf16.enabled is written by the engine: set train.precision instead"),
        ("fp16={enabled: true}", "deepspeed.fp16.enabled is written by the engine: set train.precision instead"),
        ("torch_autocast.enabled=true", "deepspeed.torch_autocast is written by the engine: set train.precision"),
        ("zero_optimization.stage=1", "deepspeed.zero_optimization.stage is written by the engine: set zero.stage"),
        (
            "zero_optimization.offload_optimizer.device=cpu",
            "offload_optimizer.device is written by the engine",
        ),
        ("activation_checkpointing.cpu_checkpointing=true", "deepspeed.activation_checkpointing has no effect"),
        (
            "compile.backend=inductor",
            "deepspeed.compile has no effect: the engine does not compile",
        ),
        ("zero_optimisation.stage=1", "did you mean 'deepspeed.zero_optimization'?"),
        ("zzz=1", "DeepSpeed does not know the key 'deepspeed.zzz'; it reads aio, bf16"),
    ],
)
def test_deepspeed_keys_that_another_section_owns_or_that_do_nothing(override, message):
    with pytest.raises(UserError) as error:
        load_config("quickstart", [f"deepspeed.{override}"])
    assert message in str(error.value)


def test_deepspeed_keys_that_act():
    given = ["fp16.loss_scale=128", "zero_optimization.reduce_bucket_size=1000", "data_types.grad_accum_dtype=bf16"]
    section = load_config("quickstart", [f"deepspeed.{override}" for override in given]).config.deepspeed
    assert section["fp16"] == {"loss_scale": 128} and section["zero_optimization"] == {"reduce_bucket_size": 1000}
