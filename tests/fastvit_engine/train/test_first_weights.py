"""What a configuration takes from the weights of `init.from`, and which contradictions are refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastvit_engine.checkpoint import load
from fastvit_engine.config import ModelConfig, load_config
from fastvit_engine.config.model_shape import resolve_shape
from fastvit_engine.errors import UserError
from fastvit_engine.models import build_vit
from fastvit_engine.models.weights.safetensors_file import model_metadata
from fastvit_engine.train import first_weights
from fastvit_engine.train.first_weights import fill_in
from tests.fastvit_engine.models.weights.official import random_arrays


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.npz"
    np.savez(path, **random_arrays(patch=4, width=24, depth=2, heads=2, hidden=40, grid=2, tanh=True, classes=7))
    return str(path)


def filled(npz, recipe="probe", **settings):
    """The configuration with what the weights say; settings: with "__" for a dot."""
    overrides = {"init.from": npz, **{key.replace("__", "."): value for key, value in settings.items()}}
    resolved = load_config(recipe, overrides)
    return fill_in(resolved, None, resume=False).apply(resolved)


def test_what_is_left_open_comes_from_the_weights(npz):
    resolved = filled(npz, model__num_classes=5)
    model, shape = resolved.config.model, resolve_shape(resolved.config.model)
    assert (shape.patch_size, shape.width, shape.depth, shape.heads, shape.mlp_dim) == (4, 24, 2, 2, 40)
    assert (model.image_size, model.num_classes, model.head, model.head_bias) == (8, 5, "linear", 0)
    assert (model.pool, model.activation, model.layer_norm_eps, model.layer_scale) == ("cls", "gelu_tanh", 1e-6, None)
    origins = {key for key, origin in resolved.origins.items() if origin == "init.from"}
    assert origins >= {"model.name", "model.image_size", "model.activation", "model.layer_scale", "data.mean"}
    assert resolved.origins["model.num_classes"] == "overrides"


def test_the_head_is_kept_with_its_tanh_layer_and_classes(npz):
    model = filled(npz, recipe=None, init__head="keep").config.model
    assert (model.head, model.num_classes) == ("mlp", 7)


@pytest.mark.parametrize("recipe", ["finetune_photos", "probe"])
def test_a_recipe_for_any_classes_keeps_those_of_the_head(npz, recipe):
    assert filled(npz, recipe, init__head="keep", model__image_size=16).config.model.num_classes == 7


def test_images_may_have_another_size_and_the_model_other_regularisation(npz):
    model = filled(
        npz, model__image_size=20, model__dropout=0.1, model__drop_path=0.2, model__head_bias=-3
    ).config.model
    assert (model.image_size, model.dropout, model.drop_path, model.head_bias) == (20, 0.1, 0.2, -3)
    with pytest.raises(UserError, match=r"model.image_size 18 is not a multiple of the patch size 4"):
        filled(npz, model__image_size=18)


def test_positions_that_are_of_one_image_size_are_refused_for_others_at_once(tmp_path):
    given = {"name": "Ti/4", "width": 24, "heads": 2, "depth": 1, "image_size": 8, "pos_embed": "relative"}
    config = ModelConfig.model_validate(given)
    metadata = model_metadata(config.model_dump(mode="json"), None, None, "here")
    path = tmp_path / "x.safetensors"
    save_file(build_vit(config, mean=(0.5,) * 3, std=(0.5,) * 3).state_dict(), path, metadata=metadata)
    assert filled(str(path)).config.model.pos_embed == "relative"
    with pytest.raises(UserError, match=r"x.safetensors has relative positions .*cannot be resampled"):
        filled(str(path), model__image_size=16)
    with pytest.raises(UserError, match=r"model.pos_embed = learned .*has pos_embed relative"):
        filled(str(path), model__pos_embed="learned")


def test_values_that_say_the_same_are_no_contradiction(npz):
    same = {"model__width": 24, "model__depth": 2, "model__heads": 2, "model__mlp_dim": 40, "model__pool": "cls"}
    once = filled(npz, **same)
    named = filled(npz, model__name="S/4", **same)  # the same numbers under another name
    assert resolve_shape(named.config.model) == resolve_shape(once.config.model)
    again = once.config.model.model_dump()  # as config.yaml has them
    assert filled(npz, **{f"model__{key}": value for key, value in again.items()}).config.model == once.config.model


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model.name": "Ti/16", "model.image_size": 16}, r"model.name = Ti/16 \(overrides\) contradicts .*w.npz has"),
        ({"model.name": "Ti/4"}, r"model.name = Ti/4 .* has width 24, depth 2, heads 2, mlp_dim 40"),
        ({"model.name": "B/4"}, r"w.npz has width 24, depth 2, heads 2, mlp_dim 40"),
        ({"model.width": 48}, r"model.width = 48 .*w.npz has width 24; leave model.width out, or start from other"),
        ({"model.mlp_dim": 48}, r"has mlp_dim 40"),
        ({"model.pool": "gap"}, r"model.pool = gap .*has pool cls"),
        ({"model.activation": "gelu"}, r"model.activation = gelu .*has activation gelu_tanh"),
        ({"model.layer_norm_eps": 1e-12}, r"has layer_norm_eps 1e-06"),
        ({"model.layer_scale": 0.1}, r"model.layer_scale = 0.1 .*has no LayerScale"),
        ({"model.head": "mlp"}, r"contradicts init.head = new, which is one linear layer: set model.head=linear"),
        (
            {"init.head": "keep", "model.num_classes": 10},
            r"has a head for 7 classes, where model.num_classes is 10: set init.head=new, or model.num_classes=7",
        ),
        ({"init.head": "keep", "model.num_classes": 7, "model.head": "linear"}, r"model.head = linear .*has head mlp"),
    ],
)
def test_a_value_that_contradicts_the_weights_is_refused_with_both(npz, settings, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        resolved = load_config("probe", {"init.from": npz, **settings})
        fill_in(resolved, None, resume=False).apply(resolved)
    assert "\n" not in str(error.value)


def test_mean_and_deviation_come_from_the_weights_and_others_are_said(npz, monkeypatch):
    known = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}

    def opened(source, **options):
        return replace(load.open_model(source, **options), pixels=known)

    monkeypatch.setattr(first_weights, "open_model", opened)
    assert filled(npz).config.data.mean == (0.48, 0.46, 0.41)
    resolved = load_config("probe", {"init.from": npz, "data.mean": [0.5, 0.5, 0.5], "data.std": known["std"]})
    found = fill_in(resolved, None, resume=False)
    assert found.apply(resolved).config.data.mean == (0.5, 0.5, 0.5)
    (warning,) = found.warnings
    assert "data.mean is [0.5, 0.5, 0.5]" in warning and "was trained with [0.48, 0.46, 0.41]" in warning
    known = None
    (warning,) = fill_in(load_config("probe", {"init.from": npz}), None, resume=False).warnings
    assert "does not say mean and std" in warning


@pytest.mark.parametrize(
    ("known", "settings", "note"),
    [
        ({"eval_crop": 0.9, "eval_transform": "fast"}, {}, "data.eval_crop=0.875, data.eval_transform=timm"),
        ({"eval_crop": 0.9}, {}, "evaluating with data.eval_crop=0.875, as the recipe says; "),
        ({"eval_crop": 0.875}, {"data.eval_transform": "fast"}, None),  # the weights do not say theirs
        ({"eval_crop": 0.87500001, "eval_transform": "timm"}, {}, None),
        ({"eval_crop": 0.9, "eval_transform": "timm"}, {"data.eval_crop": 0.9}, None),
        ({}, {}, None),
    ],
    ids=str,
)
def test_evaluation_follows_the_recipe_and_the_run_says_so_if_the_weights_say_otherwise(
    npz, monkeypatch, known, settings, note
):
    def opened(source, **options):
        return replace(load.open_model(source, **options), pixels={"mean": [0.5] * 3, "std": [0.5] * 3} | known)

    monkeypatch.setattr(first_weights, "open_model", opened)
    resolved = load_config("probe", {"init.from": npz, **settings})
    found = fill_in(resolved, None, resume=False)
    data = found.apply(resolved).config.data
    assert (data.eval_crop, data.eval_transform) == (
        resolved.config.data.eval_crop,
        resolved.config.data.eval_transform,
    )
    assert found.warnings == () and len(found.notes) == (note is not None)
    if note is not None:
        assert note in found.notes[0] and "w.npz itself is evaluated with data.eval_crop=0.9" in found.notes[0]


def test_a_head_that_is_kept_for_other_classes_than_those_of_the_data_is_said(npz, monkeypatch):
    names = ("ant", "bee", "cat", "cow", "dog", "eel", "fox")

    def opened(source, **options):
        return replace(load.open_model(source, **options), class_names=names)

    monkeypatch.setattr(first_weights, "open_model", opened)
    kept = fill_in(load_config(None, {"init.from": npz, "init.head": "keep"}), None, resume=False)
    (doubt,) = kept.doubts(["ant", "cat", "bee"])
    assert "class 1 is 'bee' in the weights of init.from and 'cat' in data.train" in doubt
    assert kept.doubts(names) == kept.doubts(names[:5]) == kept.doubts(None) == ()
    new = fill_in(load_config("probe", {"init.from": npz}), None, resume=False)
    assert new.doubts(["other", "classes"]) == ()


def test_without_weights_nothing_is_filled_in():
    resolved = load_config("quickstart")
    assert fill_in(resolved, None, resume=False).apply(resolved) is resolved


@pytest.mark.parametrize("recipe", ["finetune_pets", "finetune_photos", "probe"])
def test_a_filled_recipe_makes_a_model(npz, recipe):
    config = filled(npz, recipe, model__image_size=16).config
    model = build_vit(config.model, mean=config.data.mean, std=config.data.std)
    assert model.pos_embed.shape == (1, 17, 24)


def test_timms_names_alone_do_not_say_the_model(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"cls_token": torch.zeros(1, 1, 8)}, path)
    with pytest.raises(UserError, match=rf"`fastvit convert {path} NEW.safetensors --to timm --name B/16`"):
        filled(str(path))


def test_weights_that_are_none_are_refused(tmp_path):
    for name, content in (("w.npz", b"not a zip"), ("w.safetensors", b"x"), ("missing.npz", None)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as error:
            filled(str(tmp_path / name))
        assert name in str(error.value) and "\n" not in str(error.value)
