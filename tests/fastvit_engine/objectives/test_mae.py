import numpy as np
import pytest
import torch

from fastvit_engine.config import Config
from fastvit_engine.data import Batch
from fastvit_engine.data.pixels.randaugment import randaugment
from fastvit_engine.models import build_for_training
from fastvit_engine.objectives import build_objective, mae_targets
from fastvit_engine.objectives.masks import draw_order

CPU = torch.device("cpu")
SECTIONS = {
    "model": {"name": "Ti/4", "image_size": 16, "width": 16, "depth": 1, "heads": 2, "num_classes": 0, "pool": "gap"},
    "mae": {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2},
    "train": {"objective": "mae"},
    "data": {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.25, 0.2]},
}


def batch_of(size: int) -> Batch:
    pixels = torch.randint(0, 256, (size, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seeds = np.arange(100, 100 + size)
    return Batch(pixels, torch.zeros(size, dtype=torch.int64), torch.ones(size), [str(s) for s in seeds], seeds)


def part_of(batch: Batch, rows: slice) -> Batch:
    return Batch(*(values[rows] for values in batch[:5]))


def test_the_loss_is_the_mean_over_the_hidden_pixels_of_each_sample():
    batch, seen = batch_of(5), {}

    def model(images, visible, masked):
        seen.update(visible=visible, masked=masked)
        return torch.full((5, 12, 48), 0.25)

    losses = build_objective(Config.model_validate(SECTIONS), CPU).losses(model, batch)
    order = torch.from_numpy(draw_order(batch.seeds, 16))
    assert torch.equal(torch.cat([seen["masked"], seen["visible"]], dim=1), order)
    mean, std = (torch.tensor(SECTIONS["data"][key]).view(3, 1, 1) for key in ("mean", "std"))
    targets = mae_targets((batch.images.permute(0, 3, 1, 2) / 255 - mean) / std, 4)
    for row in range(5):
        hidden = targets[row, order[row, :12]]
        assert losses[row].item() == pytest.approx((hidden - 0.25).square().mean().item(), rel=1e-5)


def test_losses_and_gradients_do_not_depend_on_how_a_batch_is_divided():
    config = Config.model_validate(SECTIONS)
    torch.manual_seed(0)
    model, objective, batch = build_for_training(config), build_objective(config, CPU), batch_of(6)
    together = objective.losses(model, batch)
    together.mean().backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    parts = [objective.losses(model, part_of(batch, rows)) for rows in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(torch.cat(parts), together)
    (sum(part.sum() for part in parts) / 6).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_bad_sample_does_not_enter_the_loss():
    batch = batch_of(2)._replace(weights=torch.tensor([1.0, 0.0]))
    losses = build_objective(Config.model_validate(SECTIONS), CPU).losses(lambda *_: torch.ones(2, 12, 48), batch)
    assert losses[0] > 0 and losses[1] == 0


def test_targets_are_those_of_the_augmented_images():
    config = Config.model_validate(SECTIONS | {"augment": {"randaugment_ops": 2}})
    batch, seen = batch_of(4), []

    def model(images, visible, masked):
        seen.append(images)
        return torch.zeros(4, 12, 48)

    losses = build_objective(config, CPU).losses(model, batch)
    changed = randaugment(batch.images, batch.seeds, num_ops=2, magnitude=config.augment.randaugment_magnitude)
    assert torch.equal(seen[0], changed)
    plain = build_objective(Config.model_validate(SECTIONS), CPU)
    torch.testing.assert_close(losses, plain.losses(model, batch._replace(images=changed)))


def test_it_learns():
    """The same masks of the same images: the error falls far below that of the mean colour, which is 1."""
    config = Config.model_validate(SECTIONS)
    torch.manual_seed(0)
    model, objective, batch = build_for_training(config), build_objective(config, CPU), batch_of(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = objective.losses(model, batch).mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5


def test_pictures_are_what_is_seen_what_is_predicted_and_the_image():
    """A prediction that is right makes the image whole again; one of zeros makes a patch of its mean colour."""
    batch, config = batch_of(3), Config.model_validate(SECTIONS)
    mean, std = (torch.tensor(SECTIONS["data"][key]).view(3, 1, 1) for key in ("mean", "std"))
    targets = mae_targets((batch.images.permute(0, 3, 1, 2) / 255 - mean) / std, 4)
    objective = build_objective(config, CPU)
    right = objective.pictures(lambda _, __, masked: targets.take_along_dim(masked[..., None], dim=1), batch)
    assert right.dtype == torch.uint8 and right.shape == (3, 16, 48, 3)
    seen, predicted, image = right.split(16, dim=2)
    assert torch.equal(image, batch.images)
    assert (predicted.int() - image.int()).abs().max() <= 1
    masked = draw_order(batch.seeds, 16)[:, :12]
    for row in range(3):
        for patch in range(16):
            y, x = 4 * (patch // 4), 4 * (patch % 4)
            shown, own = seen[row, y : y + 4, x : x + 4], image[row, y : y + 4, x : x + 4]
            assert (shown == 128).all() if patch in masked[row] else torch.equal(shown, own)
    plain = objective.pictures(lambda *_: torch.zeros(3, 12, 48), batch).split(16, dim=2)[1]
    y, x = divmod(int(masked[0, 0]), 4)
    assert plain[0, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].flatten(0, 1).unique(dim=0).shape[0] == 1
