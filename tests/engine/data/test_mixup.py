import numpy as np
import torch

from fastvit_engine.data.mixup import mixup
from fastvit_kernels.patch_embed.reference import normalise

MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)


def _batch(size: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randint(0, 256, (size, 6, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return images, torch.arange(size)


def test_mixup_blends_each_image_with_the_one_before():
    images, labels = _batch()
    mixed, labels_a, labels_b, weight = mixup(images, labels, 0.8, MEAN, STD, np.random.default_rng(3))
    assert labels_a.tolist() == [0, 1, 2, 3, 4] and labels_b.tolist() == [4, 0, 1, 2, 3]
    assert weight.shape == (5,) and weight.unique().numel() == 1 and 0.5 <= weight[0] < 1
    pixels = normalise(images.permute(0, 3, 1, 2), MEAN, STD)
    torch.testing.assert_close(mixed, pixels * weight[0] + pixels[labels_b] * (1 - weight[0]))


def test_mixup_weight_is_the_mirrored_beta_draw_of_the_generator():
    images, labels = _batch()
    draws = [float(mixup(images, labels, 0.2, MEAN, STD, np.random.default_rng(n))[3][0]) for n in range(50)]
    expected = [np.random.default_rng(n).beta(0.2, 0.2) for n in range(50)]
    np.testing.assert_allclose(draws, [max(w, 1 - w) for w in expected], rtol=1e-6)
    assert len(set(draws)) > 40
