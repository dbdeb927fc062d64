import pytest

from benchmarks.masked_step import KINDS, measure

TINY = {"name": "Ti/4", "image_size": 16, "width": 16, "depth": 1, "heads": 2}


def test_both_kinds_of_steps_are_timed_and_counted():
    kinds = {kind: sections | {"model": sections["model"] | TINY} for kind, sections in KINDS.items()}
    kinds["masked"] |= {"mae": {"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2}}
    found = measure(images=2, rounds=3, kinds=kinds)
    low, high = found["slowest_and_fastest_round"]
    assert 0 < low <= found["times_as_fast"] <= high
    assert found["flops_ratio"] > 1 and found["milliseconds"].keys() == {"supervised", "masked"}


def test_the_models_have_the_proportions_of_the_recipe():
    masked = KINDS["masked"]
    assert masked["model"]["width"] / masked["mae"]["decoder_width"] == 1280 / 512
    assert masked["model"]["depth"] / masked["mae"]["decoder_depth"] == 32 / 8
    assert masked["mae"]["mask_ratio"] == pytest.approx(0.75)
