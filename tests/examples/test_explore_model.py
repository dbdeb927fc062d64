"""The example runs as a script, on a model and photos that are named, or on none."""

import runpy
from pathlib import Path

import pytest
from PIL import Image

from tests.docs.conftest import official, photos
from tests.in_full import only_in_full

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
__all__ = ["official", "photos"]  # fixtures
EXAMPLE = Path(__file__).parents[2] / "examples" / "explore_model.py"
PICTURES = ("predictions.png", "attention.png", "position_embedding.png")


@pytest.fixture
def explored(tmp_path, monkeypatch, capsys):
    """explored(**environment) -> what the script prints, and the names that it leaves; its pictures are in OUT."""

    def run(**environment: object):
        monkeypatch.chdir(tmp_path)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MODEL", "PHOTOS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"CUDA_VISIBLE_DEVICES": "", "OUT": "out", **environment}.items():
            monkeypatch.setenv(name, str(value))
        left = runpy.run_path(str(EXAMPLE))
        for name in PICTURES:
            with Image.open(tmp_path / "out" / name) as picture:
                assert picture.format == "PNG" and len(picture.getcolors(1 << 24) or []) > 10, name
        return capsys.readouterr().out, left

    return run


def test_a_named_model_and_photos(explored, official, photos):
    printed, left = explored(MODEL=official("ViT-B_16.npz", tanh=True), PHOTOS=photos)
    assert "224 pixels, 14^2 patches" in printed and "-shot accuracy on 10 images: " in printed
    assert "top-1 after 10 steps: " in printed and left["tuned"].config.image_size == 128
    assert left["tuned"].class_names == ("bird", "dog", "insect", "reptile")


@only_in_full
def test_a_model_without_class_token_and_head(explored, official, photos):
    model = official("ViT-B_16.npz", token=False, classes=0)
    printed, left = explored(MODEL=model, PHOTOS=photos, IMAGE_SIZE=160)
    assert left["model"].config.pool == "gap" and left["seen"].shape == (8, 10, 10)
    assert "top-1 after 10 steps: " in printed


@only_in_full
def test_without_a_model_one_is_trained_that_knows_the_digits(explored):
    printed, left = explored()
    accuracy = float(printed.partition("5-shot accuracy on 100 images: ")[2].partition("%")[0])
    assert accuracy > 60 and left["probabilities"].mean() > 0.5
