"""Augmentations of big_vision against what TensorFlow 2.21 computes and draws.

tensorflow_augmentations.npz has a small image, "OPERATION:STRENGTH" for what big_vision's code made of it with
TensorFlow, and "crops:HEIGHTxWIDTH": 2,000 (top, left, height, width) that
tf.image.stateless_sample_distorted_bounding_box drew for areas of 5 to 100 % and aspect ratios of 0.75 to 1.33.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from fastvit_engine.config import AugmentConfig, load_config
from fastvit_engine.data.pixels import randaugment_big_vision
from fastvit_engine.data.pixels.crops import draw_crops, tensorflow_crop, train_view
from fastvit_engine.data.pixels.randaugment import POLICIES, randaugment

with np.load(Path(__file__).with_name("tensorflow_augmentations.npz")) as _file:
    TENSORFLOW = dict(_file)
IMAGE = TENSORFLOW["image"]
OPERATIONS = {operation.__name__: operation for operation in randaugment_big_vision.OPERATIONS}


def changed(name, strength, image=IMAGE, **others):
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    return OPERATIONS[name](pixels, torch.tensor([strength]), **others)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("case", [case for case in TENSORFLOW if ":" in case and not case.startswith("crops")])
def test_an_operation_is_that_of_tensorflow(case):
    name, strength = case.split(":")
    ours, theirs = changed(name, float(strength)).astype(int), TENSORFLOW[case].astype(int)
    differs = np.abs(ours - theirs)
    if name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"):
        assert (differs.max(axis=2) > 0).mean() < 0.02  # if two pixels are equally near
    else:
        most = 3 if name == "sharpness" else 1  # a level of the blurred image counts up to 2.8 times
        assert differs.max() <= most and (differs > 0).mean() < 0.02


def test_all_operations_but_cutout_are_compared():
    compared = {case.split(":")[0] for case in TENSORFLOW if ":" in case and not case.startswith("crops")}
    assert compared | {"cutout"} == OPERATIONS.keys() and len(OPERATIONS) == 16


@pytest.mark.parametrize(("y", "x"), [(0.0, 0.0), (0.5, 0.5), (0.99, 0.7)])
def test_cutout_greys_a_square_that_the_border_cuts(y, x):
    image = np.zeros((200, 300, 3), np.uint8)
    grey = changed("cutout", 1.0, image, place=torch.tensor([[y, x]]))
    expected = image.copy()
    top, left = int(y * 200) - 40, int(x * 300) - 40
    expected[max(top, 0) : top + 80, max(left, 0) : left + 80] = 128
    assert np.array_equal(grey, expected)


def test_cutout_lands_anywhere_on_any_image_of_a_batch(monkeypatch):
    monkeypatch.setitem(POLICIES, "big_vision", (randaugment_big_vision.cutout,))
    images = torch.zeros(3000, 32, 32, 3, dtype=torch.uint8)
    cut = randaugment(images, np.arange(3000), num_ops=1, magnitude=1, policy="big_vision")[..., 0] == 128
    assert cut.flatten(1).any(dim=1).all()
    expected = np.array([sum(place - 4 <= pixel < place + 4 for place in range(32)) for pixel in range(32)])
    for axis in (1, 2):  # rows and columns that the square reaches
        reached = cut.any(dim=axis).sum(dim=0).numpy()
        assert np.abs(reached / 3000 - expected / 32).max() < 0.04


@pytest.mark.parametrize("size", ["375x500", "500x334", "60x600"])
def test_crops_are_distributed_as_those_of_tensorflow(size):
    height, width = map(int, size.split("x"))
    draws = draw_crops(np.arange(2000), "tensorflow")
    ours = np.array([tensorflow_crop(height, width, (0.05, 1.0), (0.75, 1.33), drawn[1:]) for drawn in draws])
    theirs = TENSORFLOW[f"crops:{size}"].astype(int)

    def figures(crops):
        top, left, h, w = crops.T
        room = np.maximum(height - h, 1), np.maximum(width - w, 1)
        return {"area": h * w, "aspect": w / h, "height": h, "top": top / room[0], "left": left / room[1]}

    ours, theirs = figures(ours), figures(theirs)
    for name in ours:
        assert stats.ks_2samp(ours[name], theirs[name]).pvalue > 1e-3, name


def test_small_crops_are_rarer_than_in_an_inception_crop():
    draws = draw_crops(np.arange(2000), "tensorflow")
    areas = [np.prod(tensorflow_crop(400, 400, (0.05, 1.0), (0.75, 1.33), drawn[1:])[2:]) / 160_000 for drawn in draws]
    assert stats.kstest(areas, stats.uniform(0.05, 0.95).cdf).pvalue < 1e-6


def test_what_does_not_fit_is_the_whole_image():
    draws = draw_crops(np.arange(1), "tensorflow")[0][1:]
    assert tensorflow_crop(10, 1000, (0.9, 1.0), (0.75, 1.33), draws) == (0, 0, 10, 1000)


def test_training_crops_of_the_kind_are_decoded_whole_as_tensorflow_does():
    draws = draw_crops(np.array([1]), "tensorflow")[0]
    view = train_view(2000, 2000, 16, AugmentConfig(crop="tensorflow", crop_ratio=(0.75, 1.33)), draws)
    assert (view.decoding, view.reduction) == ("tensorflow", 1)
    assert train_view(2000, 2000, 16, AugmentConfig(), draws).reduction > 1


def test_the_recipe_uses_them():
    augment = load_config("vit_s16_i1k_90").config.augment
    assert (augment.crop, augment.randaugment_policy, augment.randaugment_ops) == ("tensorflow", "big_vision", 2)
