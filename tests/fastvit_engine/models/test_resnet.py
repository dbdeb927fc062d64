"""The ResNets of BiT: what they compute, against timm and numpy, and what they refuse."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastvit_engine import build_model, models
from fastvit_engine.config import ModelConfig, OptimizerConfig
from fastvit_engine.config.resnet_shape import BIT_NAMES, ResNetShape, bit_name, bit_shape
from fastvit_engine.engine.optimizers.groups import parameter_groups
from fastvit_engine.errors import UserError
from fastvit_engine.models import ResNet, forward_macs, parameter_count, resolve_shape
from fastvit_engine.models.convolutions import BIT, HYBRID, StdConv
from tests.fastvit_engine.models.timm_shapes import shapes_here_and_in_timm
from tests.kernels.integrations.conftest import TORCHVISION  # lets timm be imported

assert TORCHVISION is None or TORCHVISION.ns == "torchvision"
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture(scope="module")
def r50():
    """An R50x1 with random weights, on the scale that trained ones have."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(name="R50x1", image_size=64, num_classes=7), mean=MEAN, std=STD).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.1)
    return model


@pytest.mark.parametrize(
    ("name", "count", "macs"),
    [
        ("R50x1", 25_549_352, 4.089e9),
        ("R50x3", 217_319_080, None),
        ("R101x1", 44_541_480, None),
        ("R101x3", 387_934_888, None),
        ("R152x1", 60_185_128, None),
        ("R152x2", 236_335_208, None),
        ("R152x4", 936_533_224, 182.8e9),
    ],
)
def test_counts(name, count, macs):
    """Parameters of Kolesnikov et al. 2020, as timm has them; MACs of timm's table of results."""
    config = ModelConfig(name=name)
    assert parameter_count(config) == count
    assert macs is None or forward_macs(config) == pytest.approx(macs, rel=5e-3)


@pytest.mark.parametrize("name", BIT_NAMES)
def test_names_and_shapes_are_those_of_timm(name):
    config = ModelConfig(name=name, num_classes=11)
    shapes = shapes_here_and_in_timm(config)
    assert shapes[0] == shapes[1]
    assert [*shapes[0]] == [*shapes[1]]
    listed = {f"{one.name}.weight": one.shape for one in resolve_shape(config).resnet.convolutions()}
    assert listed == {key: tuple(shape) for key, shape in shapes[0].items() if len(shape) == 4 and "head" not in key}


@pytest.mark.parametrize("size", [64, 45])
def test_equals_timm(r50, size):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    theirs = timm.create_model("resnetv2_50x1_bit", num_classes=7).eval()
    theirs.load_state_dict(r50.state_dict())
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected, found = theirs(images), r50(images)
        cells = theirs.forward_features(images).flatten(2).transpose(1, 2)
        tokens = r50.forward_features(images)
    assert expected.abs().max() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(tokens, cells, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(r50.forward_head(tokens), found, rtol=0, atol=1e-5)
        torch.testing.assert_close(r50.head(r50.represent(images)), found, rtol=0, atol=0)


def test_images_of_bytes_are_normalised_inside(r50):
    images = torch.randint(0, 256, (2, 33, 33, 3), dtype=torch.uint8)
    floats = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        expected = r50(floats)
        torch.testing.assert_close(r50(images), expected)
        torch.testing.assert_close(r50(images.permute(0, 3, 1, 2)), expected)


def test_a_new_model_says_its_head_bias_and_learns():
    torch.manual_seed(0)
    config = ModelConfig(name="R50x1", image_size=32, num_classes=5, head_bias=-3)
    model = build_model(config)
    images = torch.randn(2, 3, 32, 32)
    logits = model(images)
    assert torch.equal(logits, torch.full((2, 5), -3.0))
    logits.sum().backward()
    assert model.head.fc.weight.grad.abs().max() > 0
    nn.init.normal_(model.head.fc.weight)
    model(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_without_a_head_a_model_represents():
    model = build_model(ModelConfig(name="R50x1", image_size=32, num_classes=0)).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images), model.represent(images)) and model(images).shape == (1, 2048)
    assert parameter_count(model.config) == 25_549_352 - 2049 * 1000


def test_a_frozen_backbone_has_no_gradient():
    model = build_model(ModelConfig(name="R50x1", image_size=32, num_classes=3))
    model.freeze_backbone()
    model.train()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.fc.weight", "head.fc.bias"}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"head.fc.weight", "head.fc.bias"}
    assert not model.stages.training and model.head.training


def test_weights_are_decayed_and_those_of_the_head_by_themselves():
    with torch.device("meta"):
        model = build_model(ModelConfig(name="R50x1", num_classes=3))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, OptimizerConfig(weight_decay=0.1, head_weight_decay=0.3))
    decays = {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decays.keys() == set(names.values())
    assert {name for name, decay in decays.items() if decay == 0.3} == {"head.fc.weight"}
    convolutions = {f"{one.name}.weight" for one in model.shape.resnet.convolutions()}
    assert {name for name, decay in decays.items() if decay == 0.1} == convolutions


@pytest.mark.parametrize("size", [32, 45])
def test_a_counter_of_operations_finds_the_same(size):
    config = ModelConfig(name="R50x1", image_size=size, num_classes=7)
    with torch.device("meta"):
        model = build_model(config)
        images = torch.zeros(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert counter.get_total_flops() == 2 * forward_macs(config)


# ---- standardised weights


@pytest.mark.parametrize("convention", [BIT, HYBRID])
def test_the_gradient_of_standardised_weights(convention):
    torch.manual_seed(0)
    layer = StdConv(3, 4, 3, 2, convention).double()
    nn.init.normal_(layer.weight, mean=0.3, std=0.02)
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, weight: torch.func.functional_call(layer, {"weight": weight}, (x,)), (images, layer.weight)
    )


@pytest.mark.parametrize("convention", [BIT, HYBRID])
def test_equal_weights_have_no_gradient(convention):
    layer = StdConv(2, 2, 1, 1, convention)
    nn.init.constant_(layer.weight, 0.25)
    layer(torch.randn(1, 2, 3, 3)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.zeros_like(layer.weight)) or layer.weight.grad.isfinite().all()


def test_weights_in_bfloat16_are_standardised_in_float32():
    layer = StdConv(64, 8, 3, 1, BIT)
    nn.init.normal_(layer.weight, mean=1.0, std=0.02)  # whose deviation bfloat16 would lose
    x = torch.randn(1, 64, 5, 5)
    rounded = StdConv(64, 8, 3, 1, BIT)
    rounded.weight.data = layer.weight.data.bfloat16().float()
    found = layer.bfloat16()(x.bfloat16()).float()
    assert (found - rounded(x)).abs().max() < 0.03 * rounded(x).abs().max()


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pool": "gap"}, "model.pool = gap"),
        ({"registers": 4}, "model.registers = 4"),
        ({"heads": 4}, "model.heads = 4"),
        ({"width": 128}, "model.width = 128"),
        ({"head": "mlp"}, "model.head = mlp"),
        ({"dropout": 0.1}, "model.dropout = 0.1"),
        ({"pos_embed": "sincos_2d"}, "model.pos_embed = sincos_2d"),
        ({"layer_scale": 0.1}, "model.layer_scale = 0.1"),
    ],
)
def test_keys_of_transformers_are_refused(settings, said):
    with pytest.raises(UserError, match=rf"^{said} is of Transformers, and model.name = R50x1 is a ResNet, .*leave it"):
        resolve_shape(ModelConfig(name="R50x1", **settings))


@pytest.mark.parametrize("name", ["R51x1", "R50x0", "R50x", "R50x17", "R50x1/16", "r50x1", "R50+B/14", "R26+B/16"])
def test_unknown_names_are_refused(name):
    with pytest.raises(UserError, match=rf"model.name '{name.replace('+', '.')}' is"):
        resolve_shape(ModelConfig(name=name))


def test_other_factors_have_names_too():
    assert bit_shape("R50x2") == ResNetShape((3, 4, 6, 3), 128, preactivation=True)
    assert all(bit_name(bit_shape(name)) == name for name in [*BIT_NAMES, "R50x2", "R200x16"])
    assert bit_name(ResNetShape((1, 2, 3, 4), 64, preactivation=True)) is None


def test_what_builds_a_model_is_there_beside_the_models():
    assert models.build_model is build_model


def test_there_is_no_attention_to_look_at(r50):
    assert isinstance(r50, ResNet)
    with pytest.raises(UserError, match="R50x1 is a ResNet, which has no attention"):
        r50.attention_maps(torch.zeros(1, 3, 64, 64))
    assert np.isfinite(r50(torch.zeros(1, 3, 64, 64)).detach().numpy()).all()
