"""Targets of self-supervised objectives, against loops in NumPy."""

import numpy as np
import pytest
import torch

from fastvit_engine.objectives import mae_targets, masked_patch_targets

PATCH = 8


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """uint8 [2, 16, 24, 3]: six patches each, one of them of a single colour."""
    made = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    made[0, :8, :8] = (255, 31, 32)
    return made


def patches_of(image: np.ndarray, side: int) -> list[np.ndarray]:
    height, width, _ = image.shape
    return [image[y : y + side, x : x + side] for y in range(0, height, side) for x in range(0, width, side)]


def colour_of(square: np.ndarray) -> int:
    red, green, blue = (int(square[..., c].astype(int).sum()) * 8 // (256 * square[..., c].size) for c in range(3))
    return 64 * red + 8 * green + blue


def test_pixels_are_normalised_patch_by_patch(pixels):
    images = pixels / 127.5 - 1
    found = mae_targets(torch.from_numpy(images).permute(0, 3, 1, 2), PATCH)
    for image, targets in zip(images, found.numpy(), strict=True):
        for patch, target in zip(patches_of(image, PATCH), targets, strict=True):
            expected = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
            np.testing.assert_allclose(target, expected.reshape(-1), rtol=0, atol=1e-12)


def test_a_patch_without_contrast_is_zero_and_not_infinite():
    assert torch.equal(mae_targets(torch.full((1, 3, 4, 4), 0.3), 2), torch.zeros(1, 4, 12))


def test_the_mean_colour_has_three_bits_a_channel(pixels):
    found = masked_patch_targets(torch.from_numpy(pixels), PATCH)
    assert found.dtype == torch.int64
    assert found.tolist() == [[colour_of(patch) for patch in patches_of(image, PATCH)] for image in pixels]
    assert found[0, 0] == 64 * 7 + 8 * 0 + 1  # 31 is of the first of eight levels, 32 of the second


def test_a_level_begins_at_its_exact_mean():
    """A mean a hair below 32 is of the level below, in a patch whose sum no 16-bit number holds."""
    image = np.full((1, 32, 32, 3), 32, np.uint8)
    assert masked_patch_targets(torch.from_numpy(image), 32).item() == 64 + 8 + 1
    image[0, 5, 7] = 31
    assert masked_patch_targets(torch.from_numpy(image), 32).item() == 0


def test_the_grid_has_the_colours_of_sixteen_cells(pixels):
    found = masked_patch_targets(torch.from_numpy(pixels), PATCH, kind="grid")
    assert found.tolist() == [
        [[colour_of(cell) for cell in patches_of(patch, PATCH // 4)] for patch in patches_of(image, PATCH)]
        for image in pixels
    ]


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: mae_targets(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 4), TypeError, "floating point"),
        (lambda: mae_targets(torch.zeros(1, 8, 8, 3), 4), ValueError, r"\[B, 3, H, W\]"),
        (lambda: mae_targets(torch.zeros(1, 3, 8, 8), 3), ValueError, "8 x 8 pixels cannot be cut .* 3"),
        (lambda: masked_patch_targets(torch.zeros(1, 8, 8, 3), 4), TypeError, "uint8"),
        (lambda: masked_patch_targets(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 4), ValueError, r"\[B, H, W, 3\]"),
        (lambda: masked_patch_targets(torch.zeros(1, 6, 6, 3, dtype=torch.uint8), 6, "grid"), ValueError, "no grid"),
        (lambda: masked_patch_targets(torch.zeros(1, 6, 6, 3, dtype=torch.uint8), 6, "cells"), ValueError, "kind"),
    ],
)
def test_what_has_no_such_targets_is_refused(call, error, said):
    with pytest.raises(error, match=said):
        call()
