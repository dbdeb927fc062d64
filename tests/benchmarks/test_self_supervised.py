"""The measurement of objectives without labels: what counts as naming a colour, and a measurement of tiny runs."""

import json

import numpy as np
import pytest
import torch

from benchmarks.recipe_runs import Ran
from benchmarks.self_supervised import colour_accuracy, main, raw_pixels
from fastvit_engine.config import Config, MaskedPatchConfig
from fastvit_engine.config.model_shape import COLOURS, resolve_shape
from fastvit_engine.data import Batch
from fastvit_engine.objectives import masked_patch_targets
from tests.fastvit_engine.warm_ranks import run_ranks
from tests.in_full import only_in_full

MODEL = Config.model_validate({"model": {"name": "Ti/4", "image_size": 16}}).model
SETTINGS = MaskedPatchConfig()


def batch_of(images, weights=None):
    size = len(images)
    weights = torch.ones(size) if weights is None else torch.tensor(weights)
    labels = torch.arange(size)
    return Batch(images, labels, weights, [str(number) for number in range(size)], np.arange(size))


class Names:
    """Names a colour for each chosen patch: the true one, plus an offset."""

    shape = resolve_shape(MODEL)

    def __init__(self, offset):
        self.offset, self.masked = offset, 0

    def __call__(self, images, kind, source, chosen):
        self.masked += int((kind.unflatten(1, (4, 4))[:, :, 1:] == 1).sum())
        colours = (masked_patch_targets(images, 4).gather(1, chosen) + self.offset) % COLOURS
        return torch.nn.functional.one_hot(colours, COLOURS).float()


def test_only_patches_that_are_hidden_and_have_a_left_neighbour_count():
    images = torch.randint(0, 256, (20, 16, 16, 3), dtype=torch.uint8)
    right, wrong = Names(0), Names(1)
    found = colour_accuracy(right, [batch_of(images)], SETTINGS)
    assert (found["model"], found["patches"]) == (1.0, right.masked) and 60 < right.masked < 20 * 8
    assert colour_accuracy(wrong, [batch_of(images)], SETTINGS)["model"] == 0.0
    assert 0 < found["left"] < 0.5 and 0 < found["most_frequent"] < 0.5


def test_the_left_neighbour_is_that_of_the_same_row():
    rows = (
        torch.arange(4).repeat_interleave(4)[None, :, None, None] * 60
    )  # every row of patches has a colour of its own
    images = rows.expand(8, 16, 16, 3).to(torch.uint8)
    assert colour_accuracy(Names(0), [batch_of(images)], SETTINGS)["left"] == 1.0
    assert colour_accuracy(Names(0), [batch_of(images.transpose(1, 2))], SETTINGS)["left"] == 0.0


def test_what_is_padding_does_not_count():
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    both, one = (colour_accuracy(Names(0), [batch_of(images, w)], SETTINGS) for w in ([1.0, 1.0], [1.0, 0.0]))
    assert one["patches"] < both["patches"]


def test_pixels_are_features_as_they_are():
    images = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    features, labels, keys = raw_pixels([batch_of(images[:2]), batch_of(images[2:])])
    assert np.array_equal(features, images.flatten(1).numpy()) and features.dtype == np.float32
    assert labels.tolist() == [0, 1, 0] and list(keys) == ["0", "1", "0"]


@only_in_full
@pytest.mark.slow
@pytest.mark.distributed
def test_recipes_are_trained_and_measured(tmp_path, write_tar, photo):
    folder, out, log = tmp_path / "shards", tmp_path / "out", tmp_path / "log"
    folder.mkdir()
    for name, first in (("train-000000.tar", 0), ("train-000001.tar", 60), ("test-000000.tar", 120)):
        members = [(f"{n}.{end}", photo(n) if end == "jpg" else str(n % 2).encode())
                   for n in range(first, first + 60) for end in ("jpg", "cls")]  # fmt: skip
        write_tar(folder / name, members)

    def command(words):
        assert run_ranks(words, 1, log), log.read_text()
        return Ran("", 1.0, 1.0)

    tiny = ["model.width=16", "model.depth=1", "model.heads=2", "train.duration=4 steps", "data.shuffle_buffer=20"]
    words = [str(folder), "--out", str(out), "--runs", str(tmp_path / "runs"), *(w for s in tiny for w in ("--set", s))]
    main([*words, "--objectives", "mae"], command)
    main([*words, "--objectives", "masked_patch", "dino"], command)  # adds to what is there
    record = json.loads((out / "self_supervised.json").read_text())
    found = record["objectives"]
    assert 0.5 < found["mae"]["held_out_loss"]["4"] < 3 < found["masked_patch"]["held_out_loss"]["4"]
    assert found["masked_patch"]["colours"]["patches"] > 60 * 10
    assert [name for name, one in found.items() if "few_shot_teacher" in one] == ["dino"]
    accuracies = [one[key] for one in found.values() for key in ("few_shot", "few_shot_untrained")]
    accuracies.append(found["dino"]["few_shot_teacher"])
    assert all(0 < one["mean"] <= 1 and len(one["seeds"]) == 3 for one in [*accuracies, record["few_shot_pixels"]])
    text = (out / "self_supervised.md").read_text()
    assert "**Normalised error of hidden pixels: " in text and "**Colours of masked patches: " in text
    assert "| encoder of `dino_cifar10_cpu`, its teacher | " in text
    assert str(tmp_path) not in text + json.dumps(record)

    with pytest.raises(SystemExit, match="measured on test images, not on held-out training images: name another"):
        main([*words, "--objectives", "mae", "--choose"], lambda words: pytest.fail("trained first"))
