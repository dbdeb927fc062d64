from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastvit_engine.config import Config, ModelConfig
from fastvit_engine.config.phases import Phase
from fastvit_engine.data import Batch
from fastvit_engine.models import (
    build_for_training,
    build_vit,
    computed_flops,
    computed_macs,
    forward_macs,
    packed_flops,
    run_flops,
    training_flops,
)
from fastvit_engine.models.flops import autoencoder_macs
from fastvit_engine.objectives import build_objective


@pytest.mark.parametrize(
    ("name", "epochs", "exaflops", "tolerance"),
    [
        ("B/32", 7, 55, 0.025),
        ("B/16", 7, 224, 0.01),
        ("L/32", 7, 196, 0.01),
        ("L/16", 7, 783, 0.01),
        ("L/16", 14, 1567, 0.01),
        ("H/14", 14, 4262, 0.01),
        ("R50+B/16", 7, 274, 0.002),
        ("R152x2", 14, 1126, 0.045),
    ],
)
def test_pretraining_cost_in_the_paper(name: str, epochs: int, exaflops: float, tolerance: float) -> None:
    """Dosovitskiy et al. 2021, Table 6: pretraining on the 303 million images of JFT-300M."""
    cost = training_flops(ModelConfig(name=name)) * epochs * 303e6
    assert cost / 1e18 == pytest.approx(exaflops, rel=tolerance)


def test_counted_by_hand() -> None:
    config = ModelConfig(name="Ti/2", image_size=4, width=6, depth=3, heads=2, mlp_dim=10, num_classes=7)
    tokens = 5
    block = tokens * 6 * 18 + 2 * tokens * tokens * 6 + tokens * 6 * 6 + 2 * tokens * 6 * 10
    macs = 4 * 12 * 6 + 3 * block + 6 * 7
    assert forward_macs(config) == macs
    assert training_flops(config) == 6 * macs
    assert forward_macs(config.model_copy(update={"head": "mlp"})) == macs + 6 * 6


def test_no_class_token_is_one_token_less() -> None:
    with_token, without = (forward_macs(ModelConfig(name="H/14", pool=pool)) for pool in ("cls", "gap"))
    assert without == pytest.approx(with_token * 256 / 257, rel=1e-3)
    assert without < with_token


@pytest.mark.parametrize(
    "changes",
    [{}, {"pool": "gap"}, {"pool": "map"}, {"pool": "map", "head": "mlp", "registers": 3}, {"registers": 2},
     {"pos_embed": "relative"}, {"pos_embed": "relative", "pool": "gap"},
     {"pos_embed_at": "every_layer"}, {"pos_embed": "learned_2d", "pos_embed_at": "shared"}],
    ids=str,
)  # fmt: skip
def test_a_counter_of_operations_finds_the_same(changes: dict) -> None:
    """On plain layers, which it sees. It counts two operations per MAC."""
    config = ModelConfig(name="Ti/2", image_size=8, width=12, depth=2, heads=2, mlp_dim=20, num_classes=7).model_copy(
        update=changes
    )
    model = build_vit(config, mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    # the counter sees the two products of attention in this form of it alone, on a CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        images = torch.zeros(1, 3, 8, 8)
        model.forward_head(model.forward_features(images))
        whole = counter.get_total_flops()
        model(images)
    assert whole == 2 * forward_macs(config)
    assert counter.get_total_flops() - whole == 2 * computed_macs(config)
    assert (computed_macs(config) < forward_macs(config)) == (config.pool == "cls")


@pytest.mark.parametrize("pool", ["cls", "gap", "map"])
def test_a_counter_of_operations_finds_the_same_in_each_phase(pool: str) -> None:
    model = {"name": "Ti/2", "image_size": 8, "width": 12, "depth": 2, "heads": 2, "num_classes": 7, "pool": pool}
    model["pos_embed"] = "none"  # resampling tables, once a batch, is not counted
    tokens = {"patch_drop": 0.4, "image_sizes": [[4, "50%"]]}
    config = Config.model_validate({"model": model, "tokens": tokens})
    built = build_for_training(config).eval()
    for size, drop, visible in ((4, 0.4, 2), (4, 0.0, 4), (8, 0.4, 10), (8, 0.0, 16)):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            built(torch.zeros(1, 3, size, size), torch.arange(visible)[None])
        assert run_flops(config, Phase(0, size, drop)).computed == 3 * counter.get_total_flops()


def test_a_counter_of_operations_finds_the_same_in_subsets_of_samples() -> None:
    """Of 5 images the last block computes 2 or 3, and of a batch of one all."""
    model = {"name": "Ti/2", "image_size": 8, "width": 12, "depth": 3, "heads": 2, "num_classes": 7}
    config = Config.model_validate({"model": model | {"drop_path": 0.5, "drop_path_mode": "subset"}})
    built = build_for_training(config).train()
    for batch in (1, 2, 5):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            built(torch.zeros(batch, 3, 8, 8))
        counted = run_flops(config, micro_batches=[batch, batch]).computed * batch
        assert counted == pytest.approx(3 * counter.get_total_flops(), rel=1e-4)  # rounded to whole MACs of an image


def test_what_is_computed_of_the_huge_model() -> None:
    config = ModelConfig(name="H/14")
    assert computed_flops(config) / training_flops(config) == pytest.approx(1 - 0.026, abs=5e-4)
    head = 1280 * config.num_classes
    assert computed_flops(config, frozen="backbone") == 2 * computed_macs(config) + 2 * head


def test_resolution_changes_tokens() -> None:
    assert forward_macs(ModelConfig(name="H/14", image_size=336)) / 1e9 == pytest.approx(390.97, rel=1e-3)


@pytest.mark.parametrize("pool", ["cls", "gap"])
def test_a_counter_of_operations_finds_the_same_in_an_autoencoder(pool: str) -> None:
    """Its decoder ends with the masked patches alone; without that it is what the paper's code computes."""
    model = {"name": "Ti/2", "image_size": 8, "width": 12, "depth": 2, "heads": 2, "num_classes": 0, "pool": pool}
    mae = {"mask_ratio": 0.625, "decoder_width": 8, "decoder_depth": 2, "decoder_heads": 2}
    config = Config.model_validate({"model": model, "mae": mae, "train": {"objective": "mae"}})
    built, order = build_for_training(config).eval(), torch.arange(16)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        built(torch.zeros(1, 3, 8, 8), order[:, 10:], order[:, :10])
    assert counter.get_total_flops() == 2 * autoencoder_macs(config.model, config.mae, computed=True)
    whole, computed = run_flops(config)
    assert (whole, computed) == (6 * autoencoder_macs(config.model, config.mae), 3 * counter.get_total_flops())
    saved_attention_and_mlp = 2 * 8 * 8 + 2 * (16 + (pool == "cls")) * 8 + 2 * 8 * 32
    left = 16 - 10
    assert (whole - computed) / 6 == (left + (pool == "cls")) * saved_attention_and_mlp + left * 8 * 12


def test_masked_autoencoding_of_the_huge_model_takes_less_than_a_third() -> None:
    """He et al. 2022 train an H/14 with a decoder of 8 blocks of width 512 on a quarter of the patches."""
    model = {"name": "H/14", "pool": "gap", "num_classes": 0}
    masked = run_flops(Config.model_validate({"model": model, "train": {"objective": "mae"}}))
    supervised = run_flops(Config.model_validate({"model": {"name": "H/14"}}))
    assert supervised.computed / masked.computed == pytest.approx(3.427, rel=1e-3)


@pytest.mark.parametrize("target", ["mean", "grid", "pixels"])
def test_a_counter_of_operations_finds_the_same_in_masked_patch_prediction(target: str) -> None:
    model = {"name": "Ti/4", "image_size": 16, "width": 12, "depth": 2, "heads": 2, "num_classes": 0}
    sections = {"model": model, "masked_patch": {"target": target}, "train": {"objective": "masked_patch"}}
    config = Config.model_validate(sections)
    built, own = build_for_training(config).eval(), torch.arange(16)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        built(torch.zeros(1, 3, 16, 16), torch.ones(1, 16, dtype=torch.int8), own, own[:, :8])
    assert run_flops(config) == (3 * counter.get_total_flops(),) * 2


@pytest.mark.parametrize("frozen", [True, False])
def test_a_counter_of_operations_finds_the_same_in_telling_images_apart(frozen: bool) -> None:
    """In the forward passes of student and teacher for 3 images; backward passes are twice those, but for the keys."""
    model = {"name": "Ti/4", "image_size": 16, "width": 12, "depth": 2, "heads": 2, "num_classes": 0}
    moco = {"hidden_width": 10, "outputs": 6, "blur": False, "frozen_patches": frozen}
    train = {"objective": "moco", "global_batch_size": 3}
    config = Config.model_validate({"model": model, "moco": moco, "ema": {"decay": 0.9}, "train": train})
    built, objective = build_for_training(config), build_objective(config, torch.device("cpu"))
    average = SimpleNamespace(applied=nullcontext, add_up=lambda values: values, gather=lambda rows: (rows, 0))
    objective.learn_from(average)  # type: ignore[attr-defined]
    images = torch.randint(0, 256, (3, 2 * 3 * 16**2), dtype=torch.uint8)
    batch = Batch(images, torch.zeros(3, dtype=torch.int64), torch.ones(3), list("abc"), np.arange(3))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as teacher:
            built(images.view(6, 16, 16, 3), counted=torch.ones(3), add_up=average.add_up)
        with FlopCounterMode(display=False) as both:
            objective.losses(built, batch)
    scores = 2 * (2 * 3 * 3 * 6)  # of two views
    student = both.get_total_flops() - teacher.get_total_flops() - scores
    of_patches = 6 * 4 * (16 * 48 * 12) if frozen else 0
    assert 3 * run_flops(config).computed == 3 * student + teacher.get_total_flops() + 2 * scores - of_patches


@pytest.mark.parametrize("pool", ["cls", "gap"])
def test_an_image_of_as_many_patches_as_a_square_costs_as_much(pool: str) -> None:
    model = {"name": "S/16", "pool": pool, "image_size": 128, "registers": 1}
    config = Config.model_validate({"model": model, "packing": {"max_patches": 64, "min_patches": 16}})
    smaller = config.model.model_copy(update={"image_size": 64})
    assert packed_flops(config, 64) == computed_flops(config.model)
    assert packed_flops(config, 16) == computed_flops(smaller)
    assert packed_flops(config, 16) < run_flops(config).computed < packed_flops(config, 64)
    fixed = config.model_copy(update={"packing": config.packing.model_copy(update={"min_patches": None})})
    assert run_flops(fixed) == (training_flops(config.model), computed_flops(config.model))
