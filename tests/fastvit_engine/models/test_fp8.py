"""Which layers of a model are put into FP8 and taken out of it, what is counted, and what a plan makes of it."""

import pytest
import torch

from fastvit_engine.config import load_config
from fastvit_engine.data.stream.batch_split import split_batch
from fastvit_engine.engine.build import deepspeed_config
from fastvit_engine.errors import UserError
from fastvit_engine.models import build_for_training, computed_macs
from fastvit_engine.models import fp8 as models_fp8
from fastvit_engine.models.flops import fp8_flops_share
from fastvit_engine.models.fp8 import Fp8Layers, check_fp8_device
from fastvit_engine.sizing.activations import block_implementation, work_bytes
from fastvit_engine.sizing.compute import assumed_of_gpu

FP8 = ["train.precision=fp8", "train.fp8.emulate=true"]


def configured(*settings, recipe="quickstart"):
    return load_config(recipe, [*FP8, *settings]).config


def layers_of(*settings):
    config = configured(*settings)
    model = build_for_training(config).bfloat16()
    return model, Fp8Layers(model, config, torch.device("cpu"))


def test_blocks_and_layers_are_named_in_the_order_of_the_model():
    model, layers = layers_of("train.fp8.bf16_last_blocks=2", "train.fp8.layers=[fc2,qkv]", "train.fp8.scaling=row")
    assert layers.names == ("blocks.0.qkv", "blocks.0.fc2", "blocks.1.qkv", "blocks.1.fc2")
    assert [block.fp8 is not None for block in model.blocks] == [True, True, False, False]
    assert all(block.fp8.scaling == "row" and block.fp8.layers == {"qkv", "fc2"} for block in model.blocks[:2])
    assert layers.describe() == "FP8: qkv, fc2 of 2 blocks (0 to 1), a scale per row; all else in bf16"


def test_layers_that_do_not_fit_are_said():
    _, layers = layers_of("model.mlp_dim=100")
    assert layers.names == tuple(f"blocks.{block}.{name}" for block in range(4) for name in ("qkv", "proj"))
    assert layers.describe().endswith("all else in bf16, also fc1, fc2, whose sizes are no multiples of 16")


def test_weights_keep_their_names():
    config = configured()
    model, _ = layers_of()
    assert model.state_dict().keys() == build_for_training(config).state_dict().keys()


def test_overflows_are_taken_once_and_by_name():
    model, layers = layers_of("train.fp8.bf16_first_blocks=1")
    tokens = torch.randn(2, 5, 64).bfloat16()
    for block in model.blocks.train():
        tokens = block(tokens)
    assert layers.named(layers.take_overflows().tolist()) == frozenset()
    bad = torch.full((2, 5, 64), torch.nan, dtype=torch.bfloat16)
    model.blocks[0](bad)
    assert layers.named(layers.take_overflows().tolist()) == frozenset(), "it is in bf16"
    model.blocks[2](bad)
    assert layers.named(layers.take_overflows().tolist()) == {f"blocks.2.{n}" for n in ("qkv", "proj", "fc1", "fc2")}
    assert layers.take_overflows().count_nonzero() == 0


def test_a_layer_that_has_left_computes_in_bf16_and_may_come_back():
    model, layers = layers_of()
    block, tokens = model.blocks[1].train(), torch.randn(2, 5, 64).bfloat16()
    in_fp8 = block(tokens)
    layers.leave(["blocks.1.fc1"])
    assert block.fp8.layers == {"qkv", "proj", "fc2"} and model.blocks[0].fp8.layers == {"qkv", "proj", "fc1", "fc2"}
    layers.leave([f"blocks.1.{name}" for name in ("qkv", "proj", "fc1", "fc2")])
    assert block.fp8 is None and torch.equal(block(tokens), block.eval()(tokens))
    layers.leave([])  # back at an earlier checkpoint
    assert torch.equal(block.train()(tokens), in_fp8)


# ---- where it cannot run


def test_a_cpu_computes_it_only_if_asked_to():
    config = load_config("quickstart", ["train.precision=fp8"]).config
    with pytest.raises(
        UserError, match="needs a Hopper GPU or a later one: use bf16 on a CPU, or set train.fp8.emulate"
    ):
        deepspeed_config(config, split_batch(config, 1), on_gpu=False)
    deepspeed_config(config, split_batch(config, 1), on_gpu=True)
    assert deepspeed_config(configured("zero.stage=1"), split_batch(config, 1), on_gpu=False)["bf16"] == {
        "enabled": True
    }


def test_an_older_gpu_is_refused_with_what_to_set_instead(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(models_fp8, "obstacle", lambda device: "NVIDIA A100 is older than Hopper")
    with pytest.raises(UserError, match="cannot run here: NVIDIA A100 is older than Hopper; set train.precision=bf16"):
        check_fp8_device(load_config("quickstart", ["train.precision=fp8"]).config)
    check_fp8_device(configured())  # emulated


# ---- what a plan makes of it


def test_the_share_of_the_operations_in_fp8():
    """Of a ViT-H/14: the four layers are 12 D^2 per token; the last one's are for one token, but for k and v."""
    config = load_config("vit_h14_jft", ["train.precision=fp8", "train.fp8.bf16_last_blocks=1"]).config
    macs, blocks, last = computed_macs(config.model), 31 * 257 * 12 * 1280**2, (257 * 2 + 10) * 1280**2
    assert fp8_flops_share(config) == pytest.approx(blocks / macs, rel=1e-12)
    whole = load_config("vit_h14_jft", ["train.precision=fp8"]).config
    assert fp8_flops_share(whole) == pytest.approx((blocks + last) / macs, rel=1e-12)
    assert 0.96 < blocks / macs < 0.97
    assert fp8_flops_share(load_config("vit_h14_jft").config) == 0


def test_a_plan_takes_either_peak_for_its_share():
    bf16, fp8 = (load_config("vit_h14_jft", [f"train.precision={p}"]).config for p in ("bf16", "fp8"))
    share = fp8_flops_share(fp8)
    slow, fast = (assumed_of_gpu(config, "H200", 0.4) for config in (bf16, fp8))
    assert fast.seconds / slow.seconds == pytest.approx(share * 989 / 1979 + 1 - share)
    assert "in FP8" in fast.source and "an assumption" in fast.source and not fast.measured
    with pytest.raises(UserError, match="A100 is none: set train.precision=bf16"):
        assumed_of_gpu(fp8, "A100", 0.4)


def test_operands_in_fp8_are_counted_as_memory():
    plain = load_config("quickstart", ["train.precision=bf16"]).config
    for on_gpu, bytes_each in ((True, 2), (False, 12)):
        how = block_implementation(plain.model, "bf16", on_gpu=on_gpu)
        assert how == block_implementation(plain.model, "fp8", on_gpu=on_gpu)
        more = work_bytes(configured(), how) - work_bytes(plain, how)
        assert more == 17 * bytes_each * (64 + 256)  # fc1's inputs and outputs, for each token
