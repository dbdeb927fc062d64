"""How many cores a GPU needs: arithmetic on what is measured."""

from itertools import islice

import pytest

from fastvit_engine.config import load_config
from fastvit_engine.doctor import decoding
from fastvit_engine.doctor.decoding import Needs, check_decoding, expected_images_per_second, generated_samples
from fastvit_engine.doctor.findings import Status

CONFIG = load_config(None, ["model.name=H/14", "model.num_classes=1000"]).config


def check(needs, read_rate=None, generated=True, samples=8):
    some = generated_samples(samples)
    found = check_decoding(CONFIG, some, needs, read_rate, generated=generated, classes_known=True)
    return {one.subject: one for one in found}


def test_the_expected_rate_is_that_of_the_plan():
    """0.4 of 989 TFLOP/s, over about 0.98 TFLOP an image."""
    assert expected_images_per_second(CONFIG, "H200") == pytest.approx(0.4 * 989e12 / 0.978e12, rel=0.01)


def test_cores_that_a_gpu_needs_against_those_that_it_has():
    found = check(Needs("NVIDIA B200", 8, 4.0))
    needed, per_core = found["cores per GPU"].figures, found["decoding"].figures["images_per_second_per_core"]
    assert needed["cores"] == pytest.approx(expected_images_per_second(CONFIG, "B200") / per_core)
    assert "one B200 that trains ViT H/14" in found["cores per GPU"].found
    assert found["cores per GPU"].status == (Status.WARNING if needed["cores"] > 0.5 else Status.OK)
    assert check(Needs("NVIDIA B200", 1, 1e6))["cores per GPU"].status == Status.OK


def test_without_a_gpu_the_figure_is_of_an_h100():
    finding = check(Needs(None, 0, 2.0))["cores per GPU"]
    assert finding.found.startswith("one H100 that trains ViT H/14") and finding.found.endswith("no GPU here")


def test_a_store_that_is_too_slow_for_a_gpu():
    needs = Needs("NVIDIA H100 80GB HBM3", 1, 1e6)
    slow = check(needs, read_rate=1e6, generated=False)["reading per GPU"]
    assert (slow.status, slow.advice) == (
        Status.WARNING,
        "set data.cache to a local disk, or use a store that is nearer or faster",
    )
    assert check(needs, read_rate=1e12, generated=False)["reading per GPU"].status == Status.OK
    assert "reading per GPU" not in check(needs, read_rate=1.0)


def test_measuring_stops_in_time(monkeypatch):
    monkeypatch.setattr(decoding, "_SECONDS", 0.0)
    assert "decoding" in check(Needs(None, 0, 2.0), samples=10**9)


def test_generated_images_are_as_large_as_photos():
    sizes = [len(sample["jpg"]) for sample in islice(generated_samples(8), 8)]
    assert min(sizes) > 40_000 and max(sizes) < 160_000
