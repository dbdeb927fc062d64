"""What every source of weights becomes: a configuration, parameters, and how images are prepared."""

import pytest
import torch

from fastvit_engine import load_model
from fastvit_engine.config import ModelConfig
from fastvit_engine.errors import UserError
from fastvit_engine.models.vit import build_vit
from fastvit_engine.models.weights.pretrained import Pretrained, from_tensors

CONFIG = ModelConfig(name="Ti/4", image_size=8, num_classes=3, head="mlp", width=16, depth=1, heads=2, mlp_dim=32)
PIXELS = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}


def pretrained(pixels=None) -> Pretrained:
    state = build_vit(CONFIG, mean=(0.5,) * 3, std=(0.5,) * 3).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return from_tensors(
        "w", CONFIG, shapes, lambda names: {n: state[n].clone() for n in names}, pixels, ("a", "b", "c")
    )


@pytest.mark.parametrize(
    ("said", "transform"),
    [
        ({"eval_crop": 0.9, "eval_transform": "timm"}, "timm"),
        ({"eval_crop": 0.9}, "fast"),  # of a version that had no other
        ({}, None),
    ],
)
def test_images_are_prepared_as_the_source_says(said, transform):
    model = pretrained(PIXELS | said).build()
    assert (model.patch_embed.mean, model.patch_embed.std) == (PIXELS["mean"], PIXELS["std"])
    assert (model.eval_crop, model.eval_transform) == (said.get("eval_crop"), transform)
    assert model.class_names == ("a", "b", "c") and not model.training


def test_unknown_mean_and_std_are_said():
    with pytest.warns(UserWarning, match="w does not say mean and std of its pixels: taking 0.5 and 0.5"):
        model = pretrained().build()
    assert model.patch_embed.mean == (0.5, 0.5, 0.5) and model.eval_crop is None


def test_a_new_head_is_zero_and_has_no_class_names():
    source = pretrained(PIXELS)
    model = source.changed(num_classes=5).build()
    assert model.config.head == "linear" and model.pre_logits is None and model.class_names is None
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    assert torch.equal(model(images), torch.zeros(2, 5))
    headless = source.changed(num_classes=0).build()
    assert torch.equal(headless(images), model.represent(images))
    with pytest.raises(UserError, match="num_classes is -1"):
        source.changed(num_classes=-1)


def test_parameters_that_are_not_finite_are_refused_by_name():
    state = build_vit(CONFIG, mean=(0.5,) * 3, std=(0.5,) * 3).state_dict()
    state["blocks.0.norm2.bias"][3] = torch.nan
    source = from_tensors("w", CONFIG, {n: tuple(t.shape) for n, t in state.items()}, lambda names: state, PIXELS)
    with pytest.raises(UserError, match="w: parameter 'blocks.0.norm2.bias' holds NaN: the weights are broken"):
        source.build()


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
@pytest.mark.parametrize("name", ["x.npz", "x.safetensors", "folder"])
def test_a_file_that_cannot_be_opened_is_neither_absent_nor_damaged(tmp_path, monkeypatch, name, error):
    (tmp_path / "folder").mkdir()
    for file in ("x.npz", "x.safetensors", "folder/config.json"):
        (tmp_path / file).write_text("{}")

    def refuse(*_):
        raise error

    monkeypatch.setattr("builtins.open", refuse)  # permissions do not bind root
    with pytest.raises(UserError, match=rf"{name}\S* cannot be read \({error.strerror}\): make it readable"):
        load_model(tmp_path / name)


@pytest.mark.parametrize("name", ["x.npz", "x.safetensors"])
def test_a_folder_with_the_name_of_a_file_is_called_a_folder(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} is a folder, and by its name it must be a file"):
        load_model(tmp_path / name)
