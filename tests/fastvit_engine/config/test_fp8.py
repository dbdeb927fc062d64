"""What `train.precision: fp8` computes in FP8, and what is refused with it."""

import pytest

from fastvit_engine.config import Config, load_config
from fastvit_engine.config.checks import check_config
from fastvit_engine.config.fp8 import blocks_in_fp8, layers_in_fp8
from fastvit_engine.config.model_shape import resolve_shape
from fastvit_engine.errors import UserError

FP8 = "train.precision=fp8"
BF16 = "set train.precision=bf16"


def layers(*settings):
    config = load_config("quickstart", [FP8, *settings]).config
    return layers_in_fp8(config, resolve_shape(config.model))


def test_everything_else_is_in_bf16():
    train = load_config("quickstart", [FP8]).config.train
    assert (train.precision, train.number_format) == ("fp8", "bf16")
    assert load_config("quickstart", ["train.precision=fp16"]).config.train.number_format == "fp16"


def test_layers_of_a_block():
    assert layers() == ("qkv", "proj", "fc1", "fc2")
    assert layers("train.fp8.layers=[fc2]") == ("fc2",)
    assert layers("model.mlp_dim=100") == ("qkv", "proj")
    assert layers("model.width=40", "model.mlp_dim=160", "train.fp8.layers=[fc1,qkv]", "model.width=48") == (
        "fc1",
        "qkv",
    )


def test_blocks_of_a_model():
    def blocks(*settings):
        return list(blocks_in_fp8(load_config("quickstart", [FP8, *settings]).config.train.fp8, 4))

    assert blocks() == [0, 1, 2, 3]
    assert blocks("train.fp8.bf16_first_blocks=1", "train.fp8.bf16_last_blocks=2") == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([FP8, "train.compile=true"], "cannot be compiled: set train.compile=false, or train.precision=bf16"),
        ([FP8, "optimizer.frozen=backbone"], "which optimizer.frozen = backbone keeps as they are"),
        ([FP8, "train.fp8.bf16_first_blocks=3", "train.fp8.bf16_last_blocks=1"], "leave none of the 4 blocks to FP8"),
        ([FP8, "model.width=40", "model.mlp_dim=100"], "none of train.fp8.layers = qkv, proj, fc1, fc2 has sizes"),
        (["train.fp8.scaling=row"], "train.fp8.scaling acts with train.precision = fp8, which is fp32: set"),
        (["train.fp8.emulate=true"], "set train.precision=fp8, or leave it out"),
        ([FP8, "train.fp8.layers=[qkv,qkv]"], "name each one once"),
        ([FP8, "train.fp8.layers=[]"], "train.fp8.layers"),
        ([FP8, "train.fp8.layers=[head]"], "train.fp8.layers"),
        ([FP8, "train.fp8.fallback_after=0"], "train.fp8.fallback_after"),
        ([FP8, "deepspeed.fp16.loss_scale=1"], "deepspeed.fp16.loss_scale has no effect with train.precision = fp8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused(settings, message):
    with pytest.raises(UserError) as error:
        load_config("quickstart", settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("model", "what"),
    [("timm/vit_tiny_patch16_224", "a model of timm"), ("R50x1", "a ResNet")],
)
def test_models_without_blocks_of_this_engine_are_refused(model, what):
    config = Config.model_validate(
        {"model": {"name": model, "num_classes": 10}, "data": {"train": "x"}, "train": {"precision": "fp8"}}
    )
    with pytest.raises(UserError, match=f"is {what}: {BF16}"):
        check_config(config)


def test_options_of_deepspeeds_bf16_act():
    load_config("quickstart", [FP8, "deepspeed.bf16.check_grad_overflow=false"])
