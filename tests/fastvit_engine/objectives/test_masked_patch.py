import numpy as np
import pytest
import torch

from fastvit_engine.config import Config
from fastvit_engine.data import Batch
from fastvit_engine.models import build_for_training
from fastvit_engine.objectives import build_objective, masked_patch_targets
from fastvit_engine.objectives.masks import draw_corruption

CPU = torch.device("cpu")
SECTIONS = {
    "model": {"name": "Ti/4", "image_size": 16, "width": 16, "depth": 1, "heads": 2, "num_classes": 0},
    "train": {"objective": "masked_patch"},
}


def config_of(target: str) -> Config:
    return Config.model_validate(SECTIONS | {"masked_patch": {"target": target}})


@pytest.fixture
def batch() -> Batch:
    pixels = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(pixels, torch.zeros(5, dtype=torch.int64), torch.ones(5), list("abcde"), np.arange(100, 105))


@pytest.mark.parametrize(("target", "cells"), [("mean", 1), ("grid", 16)])
def test_the_loss_is_the_mean_cross_entropy_of_the_colours_of_chosen_patches(batch, target, cells):
    logits = torch.randn(5, 8, cells * 512, generator=torch.Generator().manual_seed(1))
    losses = build_objective(config_of(target), CPU).losses(lambda *_: logits, batch)
    chosen = draw_corruption(batch.seeds, 16, 0.5, CPU).chosen
    colours = masked_patch_targets(batch.images, 4, target).reshape(5, 16, cells)
    for row in range(5):
        wanted = colours[row, chosen[row]].flatten()
        expected = torch.nn.functional.cross_entropy(logits[row].reshape(-1, 512), wanted)
        assert losses[row].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_may_be_the_squared_error_of_pixels(batch):
    losses = build_objective(config_of("pixels"), CPU).losses(lambda *_: torch.full((5, 8, 48), 0.25), batch)
    chosen = draw_corruption(batch.seeds, 16, 0.5, CPU).chosen
    images = batch.images.numpy() / 127.5 - 1
    for row in range(5):
        corners = [(4 * (patch // 4), 4 * (patch % 4)) for patch in chosen[row].tolist()]
        errors = [(images[row, y : y + 4, x : x + 4] - 0.25) ** 2 for y, x in corners]
        assert losses[row].item() == pytest.approx(np.mean(errors), rel=1e-5)


@pytest.mark.parametrize("target", ["mean", "grid", "pixels"])
def test_losses_do_not_depend_on_how_a_batch_is_divided(batch, target):
    torch.manual_seed(0)
    model, objective = build_for_training(config_of(target)), build_objective(config_of(target), CPU)
    together = objective.losses(model, batch._replace(weights=torch.tensor([1.0, 1, 0, 1, 1])))
    parts = [
        objective.losses(model, Batch(*(values[rows] for values in batch[:5]))) for rows in (slice(0, 2), slice(2, 5))
    ]
    alone = torch.cat(parts)
    assert together[2] == 0 and alone[2] > 0
    torch.testing.assert_close(together[[0, 1, 3, 4]], alone[[0, 1, 3, 4]])
