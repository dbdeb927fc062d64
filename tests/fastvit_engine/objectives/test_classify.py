import numpy as np
import pytest
import torch

from fastvit_engine.config import Config
from fastvit_engine.config.phases import Phase
from fastvit_engine.data import Batch
from fastvit_engine.data.pixels.mix import mix
from fastvit_engine.data.pixels.randaugment import randaugment
from fastvit_engine.objectives import build_objective

CPU = torch.device("cpu")


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_a_bad_sample_and_what_is_mixed_with_it_do_not_enter_the_loss(mixup):
    """The second of four is bad: it has no loss, and with mixup neither has the first, which is mixed with it."""
    pixels = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    config = Config.model_validate({"augment": {"mixup": mixup}})

    def loss(scale: torch.Tensor) -> torch.Tensor:
        batch = Batch(pixels, torch.arange(4), torch.tensor([1.0, 0.0, 1.0, 1.0]), list("abcd"), np.arange(4))
        logits = torch.eye(4) * scale[:, None]
        return build_objective(config, CPU).losses(lambda images: logits, batch).mean()

    scale = torch.full((4,), 2.0, requires_grad=True)
    loss(scale).backward()
    assert (scale.grad != 0).tolist() == [mixup == 0, False, True, True]


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_several_labels_are_what_their_sum_is(mixup):
    """With a sigmoid loss an image of two classes costs what their binary cross-entropies do together."""
    pixels = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[0, 3], [1, -1], [4, 2], [2, -1]])
    batch = Batch(pixels, labels, torch.ones(4), list("abcd"), np.arange(4))
    config = Config.model_validate({"augment": {"mixup": mixup}, "loss": {"kind": "sigmoid"}})
    losses = build_objective(config, CPU).losses(lambda images: logits, batch)
    hot = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 1], [0, 0, 1, 0, 0]], dtype=torch.float32)
    if mixup:
        given = {"mixup": mixup, "cutmix": 0, "mean": config.data.mean, "std": config.data.std}
        weight = mix(pixels, labels, np.arange(4), **given).weight[:, None]
        hot = weight * hot + (1 - weight) * hot[[1, 0, 3, 2]]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, hot, reduction="none").sum(dim=1)
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.4}, {"cutmix": 1.0}])
def test_probabilities_are_learned_and_mixed_as_classes_are(mixing):
    pixels = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    soft = torch.rand(4, 5, generator=torch.Generator().manual_seed(2)).softmax(dim=1)
    batch = Batch(pixels, soft, torch.ones(4), list("abcd"), np.arange(4))
    config = Config.model_validate({"augment": mixing, "data": {"soft_labels": True}})
    losses = build_objective(config, CPU).losses(lambda images: logits, batch)
    if mixing:
        given = {"mixup": 0.0, "cutmix": 0.0, "mean": config.data.mean, "std": config.data.std} | mixing
        weight = mix(pixels, soft, np.arange(4), **given).weight[:, None]
        soft = weight * soft + (1 - weight) * soft[[1, 0, 3, 2]]
    torch.testing.assert_close(losses, -(soft * logits.log_softmax(dim=1)).sum(dim=1))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_label_smoothing_is_that_of_pytorch(smoothing):
    pixels, labels = torch.zeros((4, 8, 8, 3), dtype=torch.uint8), torch.tensor([3, 0, 2, 2])
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    batch = Batch(pixels, labels, torch.ones(4), list("abcd"), np.arange(4))
    config = Config.model_validate({"loss": {"label_smoothing": smoothing}, "augment": {"mixup": 0, "cutmix": 0}})
    losses = build_objective(config, CPU).losses(lambda images: logits, batch)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize(("operations", "magnitude"), [(0, 9.0), (2, 9.0), (3, 1.0)])
def test_the_model_sees_images_that_have_passed_through_as_many_operations_as_configured(operations, magnitude):
    pixels = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = Batch(pixels, torch.arange(4), torch.ones(4), list("abcd"), np.arange(4))
    augment = {"randaugment_ops": operations, "randaugment_magnitude": magnitude, "mixup": 0, "cutmix": 0}
    seen = []

    def model(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return torch.zeros(4, 5)

    build_objective(Config.model_validate({"augment": augment}), CPU).losses(model, batch)
    expected = randaugment(pixels, np.arange(4), num_ops=operations, magnitude=magnitude)
    assert torch.equal(seen[0], expected) and torch.equal(expected, pixels) == (operations == 0)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.5, 0.0), (0.0, 1.0), (0.5, 1.0)])
def test_the_model_sees_images_that_are_mixed_as_configured_and_their_labels_have_the_weights(mixup, cutmix):
    pixels = torch.randint(0, 256, (16, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels, logits = torch.arange(16) % 5, torch.randn(16, 5, generator=torch.Generator().manual_seed(1))
    data = {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.25, 0.2]}
    config = Config.model_validate({"augment": {"mixup": mixup, "cutmix": cutmix}, "data": data})
    seen = []

    def model(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return logits

    batch = Batch(pixels, labels, torch.ones(16), list("abcdefghijklmnop"), np.arange(16))
    losses = build_objective(config, CPU).losses(model, batch)
    expected = mix(pixels, labels, np.arange(16), mixup=mixup, cutmix=cutmix, **data)
    assert torch.equal(seen[0], expected.images)
    own, partners = (
        torch.nn.functional.cross_entropy(logits, given, reduction="none") for given in (labels, expected.labels_b)
    )
    torch.testing.assert_close(losses, expected.weight * own + (1 - expected.weight) * partners)


def test_dropped_patches_are_drawn_from_the_seeds_of_the_samples():
    """Whatever batch a sample is in; as many of a smaller image as its share is; none are dropped in the last phase."""
    config = Config.model_validate(
        {
            "model": {"name": "Ti/4", "image_size": 32, "num_classes": 3},
            "tokens": {"patch_drop": 0.4, "image_sizes": [[16, "50%"]]},
        }
    )
    objective, seen = build_objective(config, CPU), []

    def model(images, visible=None):
        seen.append(visible)
        return torch.zeros(len(images), 3)

    def show(phase, seeds):
        objective.enter_phase(phase)
        size, count = phase.image_size, len(seeds)
        images = torch.zeros(count, size, size, 3, dtype=torch.uint8)
        batch = Batch(images, torch.zeros(count, dtype=torch.int64), torch.ones(count), ["a"] * count, seeds)
        objective.losses(model, batch)
        return seen[-1]

    seeds = np.arange(1000, 1064)
    whole = show(Phase(0, 32, 0.4), seeds)
    assert whole.shape == (64, 64 - 26) and (whole.diff(dim=1) > 0).all()
    assert torch.equal(show(Phase(0, 32, 0.4), seeds[10:13]), whole[10:13])
    counts = torch.bincount(whole.flatten(), minlength=64)
    assert counts.min() > 22 and counts.max() < 54  # 38 of 64 on average, with a deviation of 3.9
    small = show(Phase(0, 16, 0.4), seeds)
    assert small.shape == (64, 16 - 6) and small.max() == 15
    assert show(Phase(9, 32, 0.0), seeds) is None
