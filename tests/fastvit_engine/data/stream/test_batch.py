import io
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastvit_engine.config import Config
from fastvit_engine.data.pixels.crops import View
from fastvit_engine.data.stream import batch as batch_module
from fastvit_engine.data.stream.batch import (
    BadSample,
    Batch,
    BatchBuilder,
    LabelForm,
    Workspace,
    empty_batch,
    targets,
)
from fastvit_engine.errors import UserError


def test_padding_has_no_weight():
    batch = empty_batch(3, image_size=4)
    assert batch.images.shape == (3, 4, 4, 3) and batch.images.dtype == torch.uint8
    assert batch.labels.dtype == torch.int64 and batch.weights.dtype == torch.float32
    assert batch.weights.sum() == 0 and batch.keys == ["", "", ""]


def _sample(grey: int, labels: bytes, key: str) -> dict[str, bytes | str]:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), grey, np.uint8)).save(buffer, "PNG")
    return {"__key__": key, "__url__": "a.tar", "png": buffer.getvalue(), "cls": labels}


def _built(max_labels: int, *samples: dict[str, bytes | str] | BadSample) -> Batch:
    """One row more than samples, in memory that held other images before."""
    empty = empty_batch(len(samples) + 1, 8, LabelForm(max_labels))
    empty.images.fill_(99)
    builder = _builder(empty, max_labels)
    for row, sample in enumerate(samples):
        if isinstance(sample, BadSample):
            builder.add_bad(row, sample)
        else:
            builder.add(row, sample, _whole)
    return builder.build()


def _builder(empty: Batch, max_labels: int = 1) -> BatchBuilder:
    config = Config.model_validate(
        {"model": {"num_classes": 5, "image_size": 8}, "data": {"max_labels": max_labels}, "loss": {"kind": "sigmoid"}}
    )
    return BatchBuilder(empty, config, Workspace())


def _whole(height: int, width: int) -> list[View]:
    return [View(0, 0, height, width, (8, 8))]


def test_each_sample_has_its_row_and_what_has_no_image_is_black_and_weighs_nothing():
    broken = {**_sample(0, b"4", "broken"), "png": b"no image"}
    bad = BadSample("bad", "a.tar", "is damaged")
    batch = _built(1, _sample(50, b"3", "first"), bad, _sample(70, b"2", "third"), broken)
    assert batch.images.amin(dim=(1, 2, 3)).tolist() == batch.images.amax(dim=(1, 2, 3)).tolist() == [50, 0, 70, 0, 0]
    assert batch.labels.tolist() == [3, 0, 2, 0, 0]
    assert batch.weights.tolist() == [1, 0, 1, 0, 0]
    assert batch.keys == ["first", "bad", "third", "broken", ""]
    assert [sample.key for sample in batch.bad] == ["bad", "broken"]


def test_all_labels_of_a_sample_are_kept():
    batch = _built(3, _sample(50, b"[3, 0]", "two"), _sample(70, b"[2]", "one"), _sample(0, b"[4, 1, 0]", "three"))
    assert [sorted(row) for row in batch.labels.tolist()] == [[-1, 0, 3], [-1, -1, 2], [0, 1, 4], [-1, -1, -1]]
    assert targets(batch.labels, 5)[0].tolist() == [1, 0, 0, 1, 0]


@pytest.mark.parametrize("labels", [b"[1, 2]", b"5", b"-1", b"cat"])
def test_labels_that_cannot_be_trained_on_are_refused(labels):
    with pytest.raises(UserError, match=r"sample 'k'.*a\.tar"):
        _built(1, _sample(0, labels, "k"))


def _unusable(kind: str, key: str) -> dict[str, bytes | str] | BadSample:
    if kind == "damaged":
        return BadSample(key, "a.tar", "is damaged")
    sample = _sample(0, b"4", key)
    image = sample.pop("png")
    return sample if kind == "missing" else {**sample, "png": image[:41]}  # its header alone


@pytest.mark.parametrize("kind", ["damaged", "missing", "cut short"])
@pytest.mark.parametrize("count", [15, 16, 17, 40])
def test_it_makes_no_difference_which_samples_are_decoded_together(kind, count):
    """Whether a sample is known to be bad before it is opened, then, or when it is decoded."""
    samples, rows = [], []
    for number in range(count):
        if number % 3:
            samples.append(_sample(50 + number, b"%d" % (number % 4), f"k{number}"))
            rows.append((50 + number, number % 4, 1.0, f"k{number}"))
        else:
            samples.append(_unusable(kind, f"bad{number}"))
            rows.append((0, 0, 0.0, f"bad{number}"))
    batch = _built(1, *samples)
    pixels = batch.images[:, 3, 3, 1].tolist()
    found = zip(pixels, batch.labels.tolist(), batch.weights.tolist(), batch.keys, strict=True)
    assert list(found) == [*rows, (0, 0, 0.0, "")]
    assert [sample.key for sample in batch.bad] == [f"bad{number}" for number in range(0, count, 3)]


def test_a_bad_sample_has_no_label_of_any_form():
    broken = {**_sample(0, b"[3, 1]", "broken"), "png": b"no image"}
    assert _built(3, broken).labels.tolist() == [[-1] * 3] * 2


def _watch(monkeypatch) -> tuple[list[int], list[int]]:
    """How many images are opened and not decoded, and how many decoded ones are still held, at each decoding."""
    opened, decoded, waiting, held = [], [], [], []
    cut = batch_module.cut_views

    def noted(image, views):
        def decode(buffer):
            waiting.append(len(opened) - len(decoded))
            held.append(sum(image() is not None for image in decoded))
            decoded.append(opened[len(decoded)])
            return rest(buffer)

        rest = cut(image, views)
        opened.append(weakref.ref(image))
        return decode

    monkeypatch.setattr(batch_module, "cut_views", noted)
    return waiting, held


def test_decoded_images_are_let_go(monkeypatch):
    """Pillow's hold their pixels."""
    waiting, held = _watch(monkeypatch)
    _built(1, *(_sample(number, b"4", f"k{number}") for number in range(40)))
    assert waiting == [*range(16, 0, -1), *range(16, 0, -1), *range(8, 0, -1)] and max(held) <= 1


def test_few_large_images_are_opened_together(monkeypatch):
    samples = [_sample(number, b"4", f"k{number}") for number in range(6)]
    monkeypatch.setattr(batch_module, "_TOGETHER_BYTES", 1 + max(len(sample["png"]) for sample in samples))
    waiting, _ = _watch(monkeypatch)
    _built(1, *samples)
    assert waiting == [2, 1] * 3


def test_time_after_the_last_sample_counts_as_reading(monkeypatch):
    clock = iter([0.0, 2.0, 2.0, 5.0, 5.5, 6.5])  # begin; a label, a header; build; pixels, a crop
    monkeypatch.setattr(batch_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    builder = _builder(empty_batch(1, 8))
    builder.add(0, _sample(0, b"4", "k"), _whole)
    assert builder.build().seconds == (5, 0.5, 1)
