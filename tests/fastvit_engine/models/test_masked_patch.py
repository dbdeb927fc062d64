"""The model of masked patch prediction: what it sees of corrupted patches, and what it adds to a Vision Transformer."""

import numpy as np
import pytest
import torch

from fastvit_engine.config import Config
from fastvit_engine.models import build_for_training, build_vit, is_for_pretraining
from fastvit_engine.objectives.masks import draw_corruption

MODEL = {"name": "Ti/4", "image_size": 16, "width": 24, "depth": 2, "heads": 2, "num_classes": 0}
BATCH, PATCHES = 3, 16


def built(**model):
    config = Config.model_validate({"model": MODEL | model, "train": {"objective": "masked_patch"}})
    torch.manual_seed(1)
    model = build_for_training(config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


FORMS = [{}, {"pool": "gap"}, {"registers": 2}, {"pool": "gap", "registers": 2}, {"pos_embed": "sincos_2d"}]


@pytest.mark.parametrize("changes", FORMS, ids=str)
def test_without_corruption_it_sees_images_as_a_vision_transformer_does(changes):
    model = built(**changes)
    images = torch.randint(0, 256, (BATCH, 16, 16, 3), dtype=torch.uint8)
    kind = torch.zeros(BATCH, PATCHES, dtype=torch.int8)
    own = torch.arange(PATCHES).expand(BATCH, -1)
    found = model(images, kind, own, own)
    expected = model.decoder(model.forward_features(images)[:, model.shape.prefix :])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    encoder = build_vit(model.config, mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    kept = {name: value for name, value in model.state_dict().items() if not is_for_pretraining(name)}
    encoder.load_state_dict(kept)  # which refuses any name too many or too few
    assert torch.equal(model(images), encoder(images))


def test_a_patch_is_seen_with_its_own_position_and_the_embedding_it_was_given():
    """Exchanged pixels are the same as exchanged embeddings; a mask token is the same whatever lies under it."""
    model = built(pool="gap")
    corruption = draw_corruption(np.arange(BATCH), PATCHES, 0.5, torch.device("cpu"))
    assert set(corruption.kind.unique().tolist()) == {0, 1, 2, 3}
    images = torch.randn(BATCH, 3, 16, 16)
    grid = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)  # [B, N, 3, P, P]
    changed = grid[torch.arange(BATCH)[:, None], corruption.source]
    changed[corruption.kind == 1] = 5.0
    pixels = changed.unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2, 5).reshape(BATCH, 3, 16, 16)
    masked_only = torch.where(corruption.kind == 1, corruption.kind, 0)
    own = torch.arange(PATCHES).expand(BATCH, -1)
    torch.testing.assert_close(
        model(images, *corruption), model(pixels, masked_only, own, corruption.chosen), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("target", "outputs"), [("mean", 512), ("grid", 16 * 512), ("pixels", 48)])
def test_every_parameter_learns(target, outputs):
    sections = {"model": MODEL, "train": {"objective": "masked_patch"}, "masked_patch": {"target": target}}
    model = build_for_training(Config.model_validate(sections))
    corruption = draw_corruption(np.arange(BATCH), PATCHES, 0.5, torch.device("cpu"))
    predictions = model(torch.rand(BATCH, 3, 16, 16), *corruption)
    assert predictions.shape == (BATCH, 8, outputs)
    predictions.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert {name.partition(".")[0] for name in model.state_dict() if is_for_pretraining(name)} == {
        "mask_token",
        "decoder",
    }
