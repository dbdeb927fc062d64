"""Hybrids of a ResNet and a Vision Transformer: counts, names, and what they do beside what patches of pixels do."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastvit_engine import build_model
from fastvit_engine.config import Config, ModelConfig
from fastvit_engine.config.checks import check_config
from fastvit_engine.config.resnet_shape import HYBRID_NAMES, hybrid_name, hybrid_of
from fastvit_engine.errors import UserError
from fastvit_engine.models import (
    VisionTransformer,
    build_for_training,
    computed_macs,
    forward_macs,
    parameter_count,
    resolve_shape,
)
from fastvit_engine.models.weights.timm_code import timm_code
from fastvit_kernels import dispatch
from tests.fastvit_engine.models.timm_shapes import shapes_here_and_in_timm
from tests.kernels.integrations.conftest import TORCHVISION  # lets timm be imported

assert TORCHVISION is None or TORCHVISION.ns == "torchvision"
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
TINY = {"name": "R+Ti/16", "image_size": 64, "num_classes": 7, "width": 32, "depth": 2, "heads": 2}


def tiny(**changes):
    """With random weights of the scale that trained ones have."""
    torch.manual_seed(0)
    model = build_model(ModelConfig.model_validate({**TINY, **changes}), mean=MEAN, std=STD).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.1)
    return model


@pytest.mark.parametrize(
    ("name", "count", "macs"),
    [
        ("R+Ti/16", 6_337_704, None),
        ("R26+S/32", 36_431_912, None),
        ("R26+B/32", 101_383_976, None),
        ("R50+B/16", 98_659_112, 21.54e9),
        ("R50+L/32", 328_994_856, None),
    ],
)
def test_counts(name, count, macs):
    """Those of vit_jax/models_test.py of google-research/vision_transformer."""
    assert parameter_count(ModelConfig(name=name)) == count
    assert macs is None or forward_macs(ModelConfig(name=name)) == pytest.approx(macs, rel=1e-3)


@pytest.mark.parametrize("name", HYBRID_NAMES)
def test_names_and_shapes_are_those_of_timm(name):
    config = ModelConfig(name=name, num_classes=11)
    shapes = shapes_here_and_in_timm(config)
    assert shapes[0] == shapes[1]
    hybrid = hybrid_of(name)
    assert hybrid_name(hybrid.resnet, hybrid.size) == name
    assert resolve_shape(config).patches == (49 if name.endswith("32") or name.startswith("R+") else 196)


def test_names_of_the_authors_are_known():
    assert ModelConfig(name="R50+ViT-B/16") == ModelConfig(name="R50+B/16")


@pytest.mark.parametrize(
    ("changes", "size"),
    [({}, 64), ({"pool": "gap", "registers": 2}, 32), ({"name": "R50+S/16", "width": 36, "heads": 3}, 32)],
)
def test_nearly_equals_timm(changes, size):
    """timm standardises weights with another small number, of which normalisation leaves little."""
    pytest.importorskip("timm", reason="timm is not installed")
    ours, scope = tiny(**changes, image_size=size), {}
    exec(timm_code(ours.config), scope)
    theirs = scope["model"].eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected, found = theirs(images), ours(images)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_images_of_bytes_are_normalised_inside():
    model = tiny()
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    floats = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        expected = model(floats)
        torch.testing.assert_close(model(images), expected)
        torch.testing.assert_close(model(images.permute(0, 3, 1, 2)), expected)
        assert model.attention_maps(images).shape == (2, 2, 2, 5, 5)


@pytest.mark.parametrize(
    "changes",
    [{"pos_embed": kind} for kind in ("none", "learned_2d", "relative", "sincos_2d")]
    + [{"pos_embed_at": "every_layer", "registers": 2}, {"pos_embed_at": "shared", "pool": "map"}],
    ids=str,
)
def test_positions_are_those_of_patches_of_pixels(changes):
    """With the tokens of the ResNet in place of the images, a Transformer on their patches computes the same."""
    hybrid = tiny(**changes)
    shape = hybrid.shape
    plain = VisionTransformer(
        hybrid.config.model_copy(update={"name": f"Ti/{shape.patch_size}"}), mean=MEAN, std=STD
    ).eval()
    plain.load_state_dict(
        {name: value for name, value in hybrid.state_dict().items() if "patch_embed" not in name}, strict=False
    )
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        seen = hybrid.patch_embed(images)  # without positions and class token
        plain.patch_embed = OfTokens(seen)
        torch.testing.assert_close(plain(images), hybrid(images))
        assert hybrid(images).abs().max() > 0.1


class OfTokens(nn.Module):
    """In the place of FusedPatchEmbed: adds to tokens [B, N, D] what it is given, as that does."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens

    def forward(self, images, positions, cls_token, registers, keep_indices):
        before = 0 if cls_token is None else 1
        tokens = self.tokens if positions is None else self.tokens + positions[:, before:]
        parts = []
        if cls_token is not None:
            parts.append(cls_token if positions is None else cls_token + positions[:, :1])
        parts += [] if registers is None else [registers]
        return torch.cat([*(part.expand(len(tokens), -1, -1) for part in parts), tokens], dim=1)


def test_a_new_block_is_its_shortcut_and_everything_learns():
    torch.manual_seed(0)
    config = {**TINY, "name": "R50+Ti/16", "image_size": 32, "depth": 1}
    model = build_model(ModelConfig.model_validate(config))
    assert not any(block.norm3.weight.any() for stage in model.patch_embed.backbone.stages for block in stage.blocks)
    for name, parameter in model.named_parameters():
        if name.endswith("norm3.weight") or name == "head.weight":
            nn.init.normal_(parameter, std=0.5)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("size", [48, 65])
def test_images_that_are_no_multiple_of_the_patch_are_refused(size):
    with pytest.raises(ValueError, match=f"images of {size} x {size} pixels are no multiples of 32"):
        tiny()(torch.zeros(1, 3, size, size))
    with pytest.raises(UserError, match=rf"model.image_size {size} is not a multiple of 32 \(R\+Ti/16\)"):
        resolve_shape(ModelConfig.model_validate({**TINY, "image_size": size}))


@pytest.mark.parametrize("changes", [{}, {"name": "R26+Ti/32", "pool": "gap"}, {"name": "R50+Ti/16", "image_size": 32}])
def test_a_counter_of_operations_finds_the_same(changes):
    config = ModelConfig.model_validate({**TINY, **changes})
    model = build_model(config).eval()
    # the counter sees the two products of attention in this form of it alone, on a CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        images = torch.zeros(1, 3, config.image_size, config.image_size)
        model.forward_head(model.forward_features(images))
        whole = counter.get_total_flops()
        model(images)
    assert whole == 2 * forward_macs(config)
    assert counter.get_total_flops() - whole == 2 * computed_macs(config)


def test_triton_kernels_compute_the_blocks():
    """Under Triton's interpreter, forward and backward."""
    import tests.kernels.conftest  # noqa: F401 - makes the interpreter faster

    images, gradients = torch.randn(2, 3, 64, 64), {}
    for how in ("reference", "triton"):
        model = tiny(depth=1)
        with dispatch.using(how):
            logits = model(images)
            logits.square().sum().backward()
        gradients[how] = [logits.detach(), *(parameter.grad for parameter in model.parameters())]
    assert any(not torch.equal(one, other) for one, other in zip(*gradients.values(), strict=True))
    for one, other in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


# ---- without labels


def run(objective, name="R+Ti/16", **sections):
    model = {**TINY, "name": name, "num_classes": 0} if name.startswith("R+") else {"name": name, "num_classes": 0}
    return Config.model_validate({"model": model, "train": {"objective": objective}, "ema": {"decay": 0.9}, **sections})


def test_views_of_several_sizes():
    config = run("dino", dino={"local_size": 32, "projection_width": 16, "bottleneck": 8, "prototypes": 12})
    model = build_for_training(config)
    scores = model(torch.randn(2, 3, 64, 64), torch.randn(3, 3, 32, 32), project=True)
    assert scores.shape == (5, 12) and scores.isfinite().all()


@pytest.mark.parametrize(
    ("objective", "name", "said"),
    [
        ("mae", "R+Ti/16", r"train.objective = mae hides patches, and in a hybrid \(model.name = R\+Ti/16\) a ResNet"),
        ("masked_patch", "R50+B/16", "train.objective = masked_patch hides patches"),
        ("moco", "R+Ti/16", r"set moco.frozen_patches=false"),
        ("mae", "R50x1", "train.objective = mae trains Vision Transformers, and model.name = R50x1 is a ResNet"),
        ("masked_patch", "R50x1", "is a ResNet: set train.objective=classify"),
        ("dino", "R50x1", "is a ResNet: set train.objective=classify"),
        ("moco", "R50x1", "is a ResNet: set train.objective=classify"),
    ],
)
def test_objectives_that_cannot_train_them_are_refused(objective, name, said):
    with pytest.raises(UserError, match=said):
        check_config(run(objective, name))


def test_objectives_that_compare_views_train_hybrids():
    check_config(run("dino", dino={"local_size": 32}))
    check_config(run("moco", moco={"frozen_patches": False}))


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"optimizer": {"layer_decay": 0.75}}, "optimizer.layer_decay = 0.75 .*: set optimizer.layer_decay=null"),
        ({"optimizer": {"kind": "muon"}}, "optimizer.kind = muon .*: set optimizer.kind=adamw"),
        ({"train": {"recompute": "all"}}, "train.recompute = all .*: set train.recompute=auto"),
    ],
)
def test_settings_of_blocks_are_refused_with_resnets_alone(sections, said):
    with pytest.raises(UserError, match=rf"^{said}"):
        check_config(Config.model_validate({"model": {"name": "R50x1"}, **sections}))
    check_config(Config.model_validate({"model": {"name": "R50+B/16"}, **sections}))
