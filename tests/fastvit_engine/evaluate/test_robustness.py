"""Images with parts that are missing, elsewhere, or made to deceive, and the accuracy that is left."""

import numpy as np
import pytest
import torch

from fastvit_engine.data import Batch
from fastvit_engine.errors import UserError
from fastvit_engine.evaluate.robustness import (
    RATIOS,
    WHOLE,
    Pixels,
    accuracies,
    cells_of,
    deceptive_patch,
    dropped,
    exchanged,
    in_order,
    occluded,
    pasted,
    random_corners,
    salience,
    shuffled,
    sides_for,
    usable_images,
    with_patches,
)

PIXELS = Pixels.of((0.5, 0.4, 0.3), (0.25, 0.2, 0.5), torch.device("cpu"))
SEEDS = np.arange(6)


class Brightest(torch.nn.Module):
    """Names the brightest quarter of an image, or that in which one pixel is: something that occlusion destroys."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.scale * torch.nn.functional.adaptive_avg_pool2d(images.mean(dim=1, keepdim=True), 2).flatten(1)


def batches(labels=(0, 1, 2, 3, 0, 1), size=4, order=(3, 0, 5, 1, 4, 2), bad=()):
    """Images of 8 pixels whose brightest quarter is their label, in some order, the last batch padded."""
    for start in range(0, len(order), size):
        rows = list(order[start : start + size])
        padding = size - len(rows)
        images = torch.full((size, 8, 8, 3), 160, dtype=torch.uint8)
        for place, row in enumerate(rows):
            down, right = divmod(labels[row] % 4, 2)
            images[place, 4 * down : 4 * down + 4, 4 * right : 4 * right + 4] = 200 + row
        weights = torch.tensor([float(row not in bad) for row in rows] + [0.0] * padding)
        keys = [f"k{row}" for row in rows] + [""] * padding
        chosen = torch.tensor([labels[row] for row in rows] + [0] * padding)
        yield Batch(images, chosen, weights, keys, np.array(rows + [0] * padding))


def usable(**given):
    return list(usable_images(batches(**given), PIXELS, 4))


def test_cells_are_those_of_14_rows_or_as_many_as_divide_the_image():
    assert [cells_of(size) for size in (224, 384, 32, 28, 518, 13)] == [14, 12, 8, 14, 14, 13]


def test_patches_grow_with_the_image():
    assert sides_for(224) == (16, 32, 48, 64) and sides_for(448) == (32, 64, 96, 128) and sides_for(16) == (1, 2, 3, 5)


def test_dropped_cells_have_the_mean_colour_and_others_are_as_they_were():
    images = torch.randn(2, 3, 8, 8)
    found = dropped(images, torch.tensor([[0, 5], [15, 2]]), 4)
    expected = images.clone()
    for image, cells in zip(expected, ((0, 5), (15, 2)), strict=True):
        for cell in cells:
            row, column = divmod(cell, 4)
            image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 0
    assert torch.equal(found, expected)
    grey = torch.tensor((0.5, 0.4, 0.3)).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert torch.allclose(PIXELS.normalised(grey), torch.zeros(()), atol=1e-6)


def test_exchanged_tiles_equal_numpy():
    images, order = torch.randn(2, 3, 6, 6), torch.tensor([[3, 1, 0, 2], [0, 1, 2, 3]])
    tiles = images.numpy().reshape(2, 3, 2, 3, 2, 3).transpose(0, 2, 4, 1, 3, 5).reshape(2, 4, 3, 3, 3)
    moved = np.stack([tile[o] for tile, o in zip(tiles, order.numpy(), strict=True)])
    expected = moved.reshape(2, 2, 2, 3, 3, 3).transpose(0, 3, 1, 4, 2, 5).reshape(2, 3, 6, 6)
    assert np.array_equal(exchanged(images, order, 2).numpy(), expected)


def test_shuffling_keeps_every_tile_and_leaves_out_what_does_not_divide_the_image():
    images = torch.arange(6 * 3 * 64).view(6, 3, 8, 8).float()
    found = dict(shuffled(images, SEEDS))
    assert list(found) == [2, 4, 8]
    for tiles, changed in found.items():
        assert not torch.equal(changed, images)
        side = 8 // tiles
        cut, moved = (
            x.reshape(6, 3, tiles, side, tiles, side).permute(0, 2, 4, 1, 3, 5).reshape(6, tiles**2, -1)
            for x in (images, changed)
        )
        assert torch.equal(cut[..., 0].sort(dim=1).values, moved[..., 0].sort(dim=1).values)
        assert torch.equal(moved - moved[..., :1], cut[:, :1] - cut[:, :1, :1] + torch.zeros_like(moved))


def test_a_patch_is_pasted_where_its_corner_is_and_stays_inside():
    images, patch = torch.zeros(2, 3, 8, 8), torch.arange(1.0, 13).view(3, 2, 2)
    found = pasted(images, patch, np.array([[0, 6], [3, 1]]))
    assert torch.equal(found[0, :, 0:2, 6:8], patch) and torch.equal(found[1, :, 3:5, 1:3], patch)
    assert int((found != 0).sum()) == 24
    corners = random_corners(np.arange(2000), 8, 3)
    assert set(map(tuple, corners.tolist())) == {(row, column) for row in range(6) for column in range(6)}


def test_what_matters_most_is_where_the_gradient_is():
    model, images = Brightest(), torch.zeros(1, 3, 8, 8)
    images[:, :, 4:, :4] = 1.0
    found = salience(model, images, 4)[0].view(4, 4)
    assert torch.equal(found > 0, torch.tensor([[0, 0, 0, 0]] * 2 + [[1, 1, 0, 0]] * 2).bool())
    assert images.grad is None and model.scale.grad is None


def test_salient_cells_are_dropped_first():
    """A quarter of the cells, and nothing is left of the brightest quarter: all are above the mean colour."""
    top1, samples = accuracies(Brightest(), usable(), [occluded(Brightest())])
    assert samples == 6 and top1[WHOLE] == 1.0
    assert top1["salient", 0.3] == 0.0 < top1["random", 0.3]
    assert {name for name in top1 if name != WHOLE} == {(k, r) for k in ("random", "salient") for r in RATIOS}


def test_what_is_random_follows_from_the_position_whatever_the_batches():
    changes = [occluded(Brightest()), shuffled, with_patches([torch.full((3, 3, 3), 9.0)])]
    seen = []
    for size, order in ((4, (3, 0, 5, 1, 4, 2)), (1, range(6)), (6, (5, 4, 3, 2, 1, 0))):
        of_image = {}
        for part in usable_images(batches(size=size, order=order), PIXELS, 4):
            for change in changes:
                for name, images in change(part.images, part.positions):
                    of_image |= {(key, name): image for key, image in zip(part.keys, images, strict=True)}
        seen.append(of_image)
    assert seen[0].keys() == seen[1].keys() == seen[2].keys()
    assert all(torch.equal(seen[0][name], other[name]) for other in seen[1:] for name in seen[0])


def test_another_seed_draws_other_cells():
    images = torch.randn(6, 3, 8, 8)
    first, second = (dict(shuffled(images, seeds))[4] for seeds in (SEEDS, SEEDS + 100))
    assert not torch.equal(first, second)


def test_parts_are_put_in_the_order_of_the_shards():
    found = in_order(usable(bad=(4,)), 2)
    assert [part.positions.tolist() for part in found] == [[0, 1], [2, 3], [5]]
    assert [part.keys for part in found] == [["k0", "k1"], ["k2", "k3"], ["k5"]]
    assert [part.labels.tolist() for part in found] == [[0, 1], [2, 3], [1]]
    whole = {key: image for part in usable() for key, image in zip(part.keys, part.images, strict=True)}
    assert all(
        torch.equal(image, whole[key]) for part in found for key, image in zip(part.keys, part.images, strict=True)
    )


def test_an_optimised_patch_deceives_where_a_plain_one_does_not():
    """The quarter with the bright patch is named; the labels of these images are the quarter without it."""
    torch.manual_seed(0)
    labels = tuple(int(label) for label in torch.randint(0, 4, (40,)))
    parts = usable(labels=labels, size=8, order=range(40))
    model = Brightest().eval()
    patch = deceptive_patch(model, parts, PIXELS, 4, steps=60)
    in_range = patch * PIXELS.std + PIXELS.mean
    assert patch.shape == (3, 4, 4) and in_range.min() >= 0 and in_range.max() <= 1
    assert torch.equal(patch, deceptive_patch(model, parts, PIXELS, 4, steps=60))
    top1, _ = accuracies(model, parts, [with_patches([patch])])
    assert top1[WHOLE] == 1.0 and top1["optimised", 4] < top1["plain", 4] - 0.1
    assert model.scale.grad is None


def test_images_from_a_position_on_are_used_alone():
    found = [key for part in usable_images(batches(), PIXELS, 4, since=4) for key in part.keys]
    assert sorted(found) == ["k4", "k5"]


@pytest.mark.parametrize(
    ("given", "outputs", "sentence"),
    [
        ({}, 3, "sample 'k3' has label 3, outside 0..2"),
        ({"bad": range(6)}, 4, "no sample has a usable image"),
    ],
)
def test_what_cannot_be_measured_is_refused(given, outputs, sentence):
    with pytest.raises(UserError, match=sentence):
        list(usable_images(batches(**given), PIXELS, outputs))


def test_several_labels_are_refused():
    with pytest.raises(UserError, match="set data.max_labels=1"):
        list(usable_images([next(batches())._replace(labels=torch.zeros(4, 2, dtype=torch.int64))], PIXELS, 4))
