"""The code that an export prints builds a model of timm which takes the weights strictly and computes the same."""

import copy
from typing import Any

import pytest
import torch

from fastvit_engine.config import ModelConfig, load_config, recipe_names
from fastvit_engine.config.model_shape import resolve_shape
from fastvit_engine.models.build import new_model
from fastvit_engine.models.vit import VisionTransformer
from fastvit_engine.models.weights.timm_code import timm_code
from fastvit_engine.models.weights.timm_names import open_timm_tensors
from tests.kernels.integrations.conftest import TORCHVISION  # lets timm be imported

timm = pytest.importorskip("timm", reason="timm is not installed")
assert TORCHVISION is None or TORCHVISION.ns == "torchvision"

SMALL = {"name": "Ti/4", "image_size": 12, "num_classes": 7, "width": 32, "depth": 2, "heads": 2}
USUAL = (0.5, 0.5, 0.5)


def _in_timm(code: str) -> torch.nn.Module:
    scope: dict[str, Any] = {}
    exec(code, scope)
    return scope["model"].eval()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pool": "gap"},
        {"head": "mlp"},
        {"head": "mlp", "pool": "gap"},
        {"pool": "map"},
        {"registers": 4},
        {"registers": 2, "pool": "gap", "head": "mlp"},
        {"registers": 1, "pool": "map", "layer_scale": 0.1},
        {"head": "mlp", "pool": "map", "mlp_dim": 101, "layer_norm_eps": 0.01, "activation": "gelu_tanh"},
        {"layer_scale": 0.1},
        {"layer_scale": 0.0, "pool": "gap", "head": "mlp"},
        {"activation": "gelu_tanh"},
        {"layer_norm_eps": 0.01},
        {"layer_norm_eps": 0.01, "head": "mlp"},
        {"num_classes": 0, "head": "mlp"},
        {"num_classes": 0, "pool": "gap"},
        {"mlp_dim": 101},
        {"width": 66, "heads": 3, "mlp_dim": 47},
        {"name": "H/6"},
        {"name": "G/4", "head": "mlp"},
        {"name": "So400m/4"},
        {"name": "So400m/4", "pool": "gap"},
        {"name": "So400m/4", "pool": "map", "registers": 2},
        {"image_size": 224, "name": "Ti/16", "width": None, "heads": None},
    ],
    ids=str,
)
def test_the_model_of_the_code_is_the_model(settings):
    torch.manual_seed(0)
    config = ModelConfig.model_validate({**SMALL, **settings})
    ours = VisionTransformer(config, mean=USUAL, std=USUAL).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs = _in_timm(timm_code(config))
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, config.image_size, config.image_size)
    with torch.no_grad():
        expected, found = ours(images), theirs(images)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_models_with_a_hidden_layer_keep_their_own_beside_others_and_in_copies():
    config, images = ModelConfig.model_validate({**SMALL, "head": "mlp"}), torch.randn(2, 3, 12, 12)
    scope: dict[str, Any] = {}
    exec(timm_code(config), scope)
    first = scope["model"].eval()
    torch.nn.init.normal_(first.pre_logits.fc.weight)
    copied, before = copy.deepcopy(first), first(images)
    exec(timm_code(config), scope)  # another model under the same name
    assert torch.equal(first(images), before)
    torch.nn.init.zeros_(first.pre_logits.fc.weight)
    assert torch.equal(copied(images), before) and not torch.equal(first(images), before)
    tokens = copied.forward_features(images)
    assert torch.equal(copied.head(copied.forward_head(tokens, pre_logits=True)), before)


def _shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("recipe", recipe_names())
def test_the_models_of_all_recipes_have_the_names_and_shapes_of_timm(recipe):
    shallow = [] if recipe.startswith("resnet") else ["model.depth=1"]
    config = load_config(recipe, ["data.train=x", *shallow]).config.model
    with torch.device("meta"):
        assert _shapes(_in_timm(timm_code(config))) == _shapes(new_model(config, mean=USUAL, std=USUAL))


@pytest.mark.parametrize("name", ["Ti/16", "S/32", "B/8", "L/16", "H/14", "g/14", "G/14", "So400m/14"])
def test_the_models_of_all_sizes_have_the_names_and_shapes_of_timm(name):
    config = ModelConfig(name=name)
    with torch.device("meta"):
        assert _shapes(_in_timm(timm_code(config))) == _shapes(VisionTransformer(config, mean=USUAL, std=USUAL))


SIGLIP = [name for name in timm.list_models("vit_*_siglip_*", exclude_filters="*qkvb*") if "_patch" in name]


@pytest.mark.parametrize("name", SIGLIP)
def test_the_models_of_siglip_are_known_by_name(name):
    with torch.device("meta"):
        theirs = timm.create_model(name)
        found = open_timm_tensors("x", name, {key: tuple(shape) for key, shape in _shapes(theirs).items()}, dict)
        assert _shapes(VisionTransformer(found.config, mean=USUAL, std=USUAL)) == _shapes(theirs)
    assert found.config.pool == ("gap" if "_gap" in name else "map")
    assert found.config.activation == ("gelu_tanh" if "Tanh" in type(theirs.blocks[0].mlp.act).__name__ else "gelu")
    assert resolve_shape(found.config).heads == theirs.blocks[0].attn.num_heads
    assert (found.config.name.partition("/")[0] == "So400m") == ("so400m" in name)


def test_the_code_is_no_longer_than_it_must_be():
    assert (
        timm_code(ModelConfig()) == "import timm\nmodel = timm.create_model('vit_base_patch16_224', num_classes=1000)"
    )
    photos = ModelConfig(name="S/16", num_classes=120, pool="gap")
    assert timm_code(photos).endswith(
        "create_model('vit_small_patch16_224', num_classes=120, class_token=False, global_pool='avg', fc_norm=False)"
    )
