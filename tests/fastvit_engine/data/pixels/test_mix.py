import numpy as np
import torch

from fastvit_engine.data.pixels.mix import Mixed, mix
from fastvit_kernels.patch_embed.reference import normalise

MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)


def _mix(size: int, *, mixup: float = 0.0, cutmix: float = 0.0, first_seed: int = 0) -> tuple[torch.Tensor, Mixed]:
    images = torch.randint(0, 256, (size, 16, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seeds = np.arange(first_seed, first_seed + size)
    return images, mix(images, torch.arange(size), seeds, mixup=mixup, cutmix=cutmix, mean=MEAN, std=STD)


def test_mixup_blends_pairs():
    images, mixed = _mix(6, mixup=0.8)
    assert mixed.labels.tolist() == [0, 1, 2, 3, 4, 5] and mixed.labels_b.tolist() == [1, 0, 3, 2, 5, 4]
    assert mixed.weight[0] == mixed.weight[1] != mixed.weight[2]
    pixels, weight = normalise(images.permute(0, 3, 1, 2), MEAN, STD), mixed.weight.view(-1, 1, 1, 1)
    torch.testing.assert_close(mixed.images, pixels * weight + pixels[mixed.labels_b] * (1 - weight))


def test_last_image_of_an_odd_batch_stays():
    images, mixed = _mix(3, mixup=0.8)
    assert mixed.labels_b[2] == 2 and mixed.weight[2] == 1
    torch.testing.assert_close(mixed.images[2], normalise(images.permute(0, 3, 1, 2), MEAN, STD)[2])


def test_mixup_weights_follow_the_mirrored_beta_distribution():
    weights = _mix(4000, mixup=0.4)[1].weight[::2].numpy()
    drawn = np.random.default_rng(0).beta(0.4, 0.4, size=100_000)
    quantiles = np.linspace(0.05, 0.95, 19)
    expected = np.quantile(np.maximum(drawn, 1 - drawn), quantiles)
    assert weights.min() >= 0.5 and np.abs(np.quantile(weights, quantiles) - expected).max() < 0.03


def test_cutmix_weight_is_the_share_of_the_image_that_stays():
    images, mixed = _mix(400, cutmix=1.0)
    assert mixed.images.dtype == torch.uint8
    own, partners = mixed.images == images, mixed.images == images[mixed.labels_b]
    assert (own | partners).all()
    # random pixels of two images agree by chance in 1 of 256**3 cases: what stayed can be counted
    stayed = own.all(dim=3).float().mean(dim=(1, 2))
    torch.testing.assert_close(stayed, mixed.weight, atol=1e-6, rtol=0)
    assert 0.3 < mixed.weight.mean() < 0.8 and mixed.weight.min() < 0.25


def test_both_are_drawn_for_about_half_of_the_pairs_each():
    images, both = _mix(600, mixup=0.5, cutmix=1.0)
    pixels = normalise(images.permute(0, 3, 1, 2), MEAN, STD)
    unblended = (both.images == pixels) | (both.images == pixels[both.labels_b])
    cut = unblended.all(dim=3).all(dim=2).all(dim=1)
    assert 0.4 < cut.float().mean() < 0.6


def test_a_pair_does_not_depend_on_its_batch():
    _, whole = _mix(8, mixup=0.5, cutmix=1.0)
    images = torch.randint(0, 256, (8, 16, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    part = mix(images[4:6], torch.tensor([4, 5]), np.array([4, 5]), mixup=0.5, cutmix=1.0, mean=MEAN, std=STD)
    assert torch.equal(part.images, whole.images[4:6]) and torch.equal(part.weight, whole.weight[4:6])
