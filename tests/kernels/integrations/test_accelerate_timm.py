import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from fastvit_kernels import accelerate, dispatch
from tests.in_full import in_full
from tests.kernels.integrations.equality import (
    GATED,
    HALVES,
    WHOLE,
    accelerated,
    assert_equal,
    randomised,
    relative,
    rows,
)

timm = pytest.importorskip("timm", reason="timm is not installed")
vision_transformer = pytest.importorskip("timm.models.vision_transformer", reason="timm is not installed")
mlp = pytest.importorskip("timm.layers.mlp", reason="timm is not installed")

IMAGES = torch.randn(3, 3, 24, 40, generator=torch.Generator().manual_seed(5))  # 3 x 5 patches of 8


def vit(**options: Any) -> nn.Module:
    settings = {"img_size": (24, 40), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    return randomised(vision_transformer.VisionTransformer(**(settings | options)))


def run(model: nn.Module) -> torch.Tensor:
    return model(IMAGES)


@pytest.mark.parametrize(
    ("options", "layer_norms"),
    [
        ({}, 1),
        ({"init_values": 0.1, "drop_path_rate": 0.5}, 1),
        ({"proj_drop_rate": 0.3, "pos_drop_rate": 0.1, "drop_path_rate": 0.5}, 1),
        ({"class_token": False, "global_pool": "avg"}, 1),
        ({"reg_tokens": 4, "no_embed_class": True}, 1),
        ({"qkv_bias": False, "proj_bias": False}, 1),
        ({"act_layer": "gelu_tanh", "mlp_ratio": 2.7}, 1),
        ({"pre_norm": True}, 2),
        ({"patch_drop_rate": 0.3}, 1),
        ({"dynamic_img_size": True}, 1),
        ({"norm_layer": nn.LayerNorm}, 1),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_vits_are_fused_and_equal(calls: Counter[str], options: dict[str, Any], layer_norms: int) -> None:
    model = vit(**options).train()
    ours, acceleration = accelerated(model)
    assert_equal(ours, model, run)  # the random numbers of dropout and drop path are drawn in the same order
    drops = "proj_drop_rate" in options
    blocks = {"attention_block": 2, "layer_norm_mlp": 2} if drops else {"transformer_block": 2}
    assert calls == {"patch_embed": 1, **blocks, "layer_norm": layer_norms}
    assert rows(acceleration)["blocks.0"] == rows(acceleration)["blocks.1"] == (HALVES if drops else WHOLE)
    calls.clear()
    assert_equal(ours.eval(), model.eval(), run)
    assert calls["transformer_block"] == 2 and rows(acceleration)["blocks.1"] == WHOLE


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "deit3_small_patch16_224"]
)
def test_named_models(calls: Counter[str], name: str) -> None:
    model = timm.create_model(name, depth=1, img_size=48, num_classes=7, drop_path_rate=0.1)
    ours, _ = accelerated(model)
    images = torch.randn(2, 3, 48, 48)
    assert_equal(ours, model, lambda m: m(images))
    assert calls == {"patch_embed": 1, "transformer_block": 1, "layer_norm": 1}


@pytest.mark.parametrize(
    "options",
    [
        {"mlp_layer": mlp.SwiGLUPacked, "init_values": 0.1, "drop_path_rate": 0.5},  # as DINOv2-g
        {"mlp_layer": partial(mlp.SwiGLU, align_to=8), "mlp_ratio": 2.7},
        {"mlp_layer": mlp.SwiGLU, "proj_bias": False},
    ],
    ids=["packed", "two layers", "without biases"],
)
def test_gated_mlps_are_fused_and_equal(calls: Counter[str], options: dict[str, Any]) -> None:
    model = vit(act_layer=nn.SiLU, **options).train()
    ours, acceleration = accelerated(model)
    assert rows(acceleration)["blocks.0"] == rows(acceleration)["blocks.1"] == GATED
    assert_equal(ours, model, run)
    assert calls == {"patch_embed": 1, "attention_block": 2, "layer_norm_swiglu": 2, "layer_norm": 1}
    model.blocks[1].mlp.drop1.p = ours.blocks[1].mlp.drop1.p = 0.3
    model.blocks[1].mlp.drop2.p = ours.blocks[1].mlp.drop2.p = 0.3
    reason = "no layer_norm_swiglu in training: dropout 0.3 in a gated MLP"
    assert rows(acceleration)["blocks.1"] == (GATED[0], reason)
    assert_equal(ours, model, run)
    assert calls["layer_norm_swiglu"] == 3


def test_the_giant_of_dinov2() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_giant_patch14_dinov2", depth=1, num_classes=0)
    assert rows(accelerate(model))["blocks.0"] == GATED


def test_halves_that_are_not_one_block_run_one_after_the_other(calls: Counter[str]) -> None:
    model = vit(drop_path_rate=0.5).train()
    model.blocks[0].norm2.eps = 0.1
    model.blocks[1].drop_path1.drop_prob = 0.3
    ours, acceleration = accelerated(model)
    assert rows(acceleration)["blocks.0"] == rows(acceleration)["blocks.1"] == HALVES
    assert_equal(ours, model, run)
    assert calls["attention_block"] == calls["layer_norm_mlp"] == 2
    assert_equal(ours.eval(), model.eval(), run)
    assert calls["transformer_block"] == 1 and rows(acceleration)["blocks.1"] == WHOLE  # it drops in training only


def test_the_table_says_who_runs_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "is_on_gpu", lambda tensor: True)
    acceleration = accelerate(vit(depth=1).to(torch.bfloat16))
    block = acceleration.model.blocks[0]
    for setting, by in (("auto", "triton"), ("block=reference", "triton"), ("mlp=reference", "triton + reference")):
        with dispatch.using(setting):
            line = next(line for line in str(acceleration).splitlines() if line.startswith("blocks.0"))
            assert line.split(maxsplit=3) == ["blocks.0", "Block", "block", by]
            assert f"runs={by}\n" in repr(block)


def test_half_precision_weights(calls: Counter[str]) -> None:
    model = vit(init_values=0.1).to(torch.bfloat16)
    ours, _ = accelerated(model)
    images = IMAGES.to(torch.bfloat16)
    exact = copy.deepcopy(model).float()(images.float())
    assert relative(ours(images).float(), exact) <= 2 * relative(model(images).float(), exact) + 2**-8
    assert calls["transformer_block"] == 2


def test_a_wider_layer_scale_widens_the_result(calls: Counter[str]) -> None:
    block = vit(depth=1, init_values=0.1).blocks[0].to(torch.bfloat16)
    block.ls2.float()
    ours, acceleration = accelerated(block)
    reason = "no layer_norm_mlp: the layer scale is torch.float32, the weights are torch.bfloat16"
    assert rows(acceleration)[""] == ("attention_block", reason)
    assert ours(torch.randn(1, 5, 24, dtype=torch.bfloat16)).dtype == torch.float32
    assert calls["attention_block"] == 1 and not calls["layer_norm_mlp"]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"scale_attn_norm": True}, ("layer_norm_mlp", "no attention_block: attn.norm is LayerNorm")),
        ({"scale_mlp_norm": True}, ("attention_block", "no layer_norm_mlp: mlp.norm is LayerNorm")),
        ({"attn_layer": "diff", "num_heads": 2}, ("layer_norm_mlp", "no attention_block: attn is DiffAttention")),
        (
            {"mlp_layer": mlp.SwiGLU},
            ("attention_block", "no layer_norm_mlp: the activation of the gate is GELU"),
        ),
        (
            {"mlp_layer": mlp.GluMlp, "act_layer": nn.SiLU},
            ("attention_block", "no layer_norm_mlp: the gate comes last"),
        ),
        ({"mlp_layer": mlp.GatedMlp}, ("attention_block", "no layer_norm_mlp: mlp is GatedMlp")),
        ({"act_layer": "quick_gelu"}, ("attention_block", "no layer_norm_mlp: activation QuickGELU")),
        (
            {"attn_drop_rate": 0.2},
            ("attention_block + layer_norm_mlp", "no attention_block in training: attention dropout 0.2"),
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_half_blocks_that_are_not_standard(
    calls: Counter[str], options: dict[str, Any], found: tuple[str, str]
) -> None:
    model = vit(**options).train()
    ours, acceleration = accelerated(model)
    assert rows(acceleration)["blocks.1"] == found
    assert_equal(ours, model, run)
    in_training = {part for part in ("attention_block", "layer_norm_mlp") if f"no {part}" not in found[1]}
    assert {part for part in ("attention_block", "layer_norm_mlp") if calls[part]} == in_training
    assert_equal(ours.eval(), model.eval(), run)


@pytest.mark.parametrize("block", ["ParallelScalingBlock", "ParallelThingsBlock", "ResPostBlock"])
def test_other_blocks_are_left_alone(calls: Counter[str], block: str) -> None:
    kind = getattr(vision_transformer, block)
    ours, acceleration = accelerated(vit(block_fn=kind))
    assert all(type(b) is kind for b in ours.blocks)
    assert rows(acceleration)["blocks.0"] == ("", f"no fused form of {block}")
    run(ours)
    assert not calls.keys() & {"transformer_block", "attention_block", "layer_norm_mlp"}


@pytest.mark.parametrize("options", [{}, in_full({"drop_path_rate": 0.5, "proj_drop_rate": 0.3, "init_values": 0.1})])
def test_normalised_queries_and_keys(calls: Counter[str], options: dict[str, Any]) -> None:
    model = vit(qk_norm=True, **options).train()
    ours, acceleration = accelerated(model)
    assert rows(acceleration)["blocks.1"] == ("layer_norm + rotary + attention + layer_norm_mlp", "")
    assert_equal(ours, model, run)
    assert calls["rotary_qk_norm"] == 2
    model.blocks[0].attn.q_norm.eps = 1.0
    assert "no attention_block: attn.q_norm and attn.k_norm differ in eps" in rows(accelerated(model)[1])["blocks.0"][1]


def test_subclasses_are_left_alone() -> None:
    class Louder(vision_transformer.Block):
        def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
            return 2 * super().forward(x, **options)

    model = vit(block_fn=Louder)
    ours, acceleration = accelerated(model)
    assert rows(acceleration)["blocks.0"] == ("", "a subclass of Block, whose forward may differ")
    assert_equal(ours, model, run)


@pytest.mark.parametrize("options", [{"attn_mask": torch.ones(16, 16).tril().bool()}, {"is_causal": True}])
def test_masks_are_honoured(calls: Counter[str], options: dict[str, Any]) -> None:
    model = vit()
    ours, _ = accelerated(model)
    assert_equal(ours, model, lambda m: m(IMAGES, **options))
    assert not torch.allclose(ours(IMAGES, **options), ours(IMAGES), atol=1e-2)
    assert calls["layer_norm_mlp"] == 4 and calls["transformer_block"] == 2  # of the call without a mask
    assert not calls["attention_block"]


CHANGES: dict[str, Callable[[Any], Any]] = {
    "hook on attn": lambda block: block.attn.register_forward_hook(lambda module, args, output: output * 2),
    "hook on qkv": lambda block: block.attn.qkv.register_forward_hook(lambda module, args, output: output * 2),
    "hook before norm2": lambda block: block.norm2.register_forward_pre_hook(lambda module, args: (args[0].abs(),)),
    "backward hook on fc1": lambda block: block.mlp.fc1.register_full_backward_hook(
        lambda module, before, after: (before[0] * 2,)
    ),
    "forward of proj": lambda block: setattr(block.attn.proj, "forward", lambda x: x * 2),
    "other fc1": lambda block: setattr(block.mlp, "fc1", nn.Sequential(block.mlp.fc1, nn.Tanh())),
    "other activation": lambda block: setattr(block.mlp, "act", nn.ReLU()),
    "parametrised qkv": lambda block: nn.utils.parametrizations.spectral_norm(block.attn.qkv.eval()),
    "another part": lambda block: setattr(
        block, "attn", vision_transformer.Attention(24, 3, qkv_bias=True, gated=True).eval()
    ),
    "other eps": lambda block: setattr(block.norm1, "eps", 0.5),
    "other scale": lambda block: setattr(block.attn, "scale", 0.1),
    "drop path of 1": lambda block: (setattr(block, "drop_path1", vision_transformer.DropPath(1.0)), block.train()),
    "other drop path": lambda block: (setattr(block, "drop_path2", vision_transformer.DropPath(0.5)), block.train()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_changes_before_and_after_count(change: str, when: str) -> None:
    """Whatever a user attaches to a block or exchanges in it acts as in the plain model."""
    model = vit(depth=1).eval()
    model.blocks[0].attn.fused_attn = change != "other scale"  # which timm uses in its own attention only
    ours = copy.deepcopy(model)
    plain = run(model)
    if when == "after":
        accelerate(ours)
    for changed in (ours, model):
        torch.manual_seed(9)
        CHANGES[change](changed.blocks[0])
    if when == "before":
        accelerate(ours)
    assert_equal(ours, model, run)
    torch.manual_seed(3)
    assert change == "backward hook on fc1" or not torch.allclose(run(model).to(plain), plain, atol=1e-3)


@pytest.mark.parametrize("name", ["Block", "Attention", "Mlp"])
def test_a_class_with_an_exchanged_forward_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = getattr(vision_transformer, name)
    own = kind.forward
    early = vit(depth=1).eval()
    late, _ = accelerated(early)
    monkeypatch.setattr(kind, "forward", lambda self, x, *args, **kwargs: own(self, x, *args, **kwargs).abs())
    ours, acceleration = accelerated(early)
    assert "not the one" in rows(acceleration)["blocks.0"][1]
    assert_equal(ours, early, run)
    assert_equal(late, early, run)


def test_hooks_show_in_the_table() -> None:
    model = vit()
    acceleration = accelerate(model)
    handle = model.blocks[0].attn.register_forward_hook(lambda *_: None)
    assert rows(acceleration)["blocks.0"] == ("layer_norm_mlp", "no attention_block: attn has a hook")
    handle.remove()
    assert rows(acceleration)["blocks.0"] == WHOLE


def test_hooks_on_all_modules_see_all_modules() -> None:
    model = vit(depth=1)
    accelerate(model)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        run(model)
    finally:
        handle.remove()
    assert model.blocks[0].attn.qkv in seen


def test_hooks_on_a_block_fire() -> None:
    model = vit(depth=1)
    accelerate(model)
    outputs = []
    model.blocks[0].register_forward_hook(lambda module, args, output: outputs.append(output))
    run(model)
    assert outputs[0].shape == (3, 16, 24)


@pytest.mark.parametrize("options", [{}, {"init_values": 0.1}], ids=["plain", "layer scale"])
def test_autocast(calls: Counter[str], options: dict[str, Any]) -> None:
    model = vit(**options)
    ours, _ = accelerated(model)
    exact = run(copy.deepcopy(model)).detach()
    calls.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, expected = run(ours), run(model)
        features, expected_features = (m.forward_features(IMAGES) for m in (ours, model))
    assert output.dtype == expected.dtype == torch.bfloat16
    assert features.dtype == expected_features.dtype == torch.float32
    assert relative(output.float(), exact) <= 2 * relative(expected.float(), exact) + 2**-8
    assert calls == {"transformer_block": 4, "layer_norm": 2}


def test_autocast_over_a_narrow_residual_stream(calls: Counter[str]) -> None:
    """Results widen there, and weights have another dtype than what comes in: the library's own path."""
    block = vit(depth=1).blocks[0]
    ours, _ = accelerated(block)
    narrow = torch.randn(2, 5, 24, dtype=torch.bfloat16)
    for m in (block, ours):
        m.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(narrow), block(narrow)) and ours(narrow).dtype == block(narrow).dtype
    assert not calls


def test_checkpointing(calls: Counter[str]) -> None:
    model = vit(drop_path_rate=0.5).train()
    model.set_grad_checkpointing()
    ours, _ = accelerated(model)
    assert_equal(ours, model, run)
    assert calls["transformer_block"] > 2  # once more in the backward pass


def test_an_optimizer_made_before_still_steps() -> None:
    plain, ours = vit(), vit()
    ours.load_state_dict(plain.state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (plain, ours)]
    accelerate(ours)
    for _ in range(3):
        for model, optimizer in zip((plain, ours), optimizers, strict=True):
            optimizer.zero_grad()
            run(model).square().mean().backward()
            optimizer.step()
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(tensor, ours.state_dict()[name], atol=1e-5), name


def test_state_goes_both_ways_and_undo_restores() -> None:
    plain, ours = vit(init_values=0.1), vit(init_values=0.1)
    kinds, modules = [type(m) for m in ours.modules()], list(ours.modules())
    acceleration = accelerate(ours)
    ours.load_state_dict(plain.state_dict())
    assert relative(run(ours), run(plain)) <= 1e-5
    again = vit(init_values=0.1)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(run(again), run(plain))
    acceleration.undo()
    assert [type(m) for m in ours.modules()] == kinds
    assert all(a is b for a, b in zip(ours.modules(), modules, strict=True))
    assert torch.equal(run(ours), run(plain))


@pytest.mark.parametrize("options", [{"init_values": 0.1}, in_full({"qk_norm": True})], ids=",".join)
def test_compiled(options: dict[str, Any]) -> None:
    model = vit(depth=1, **options).eval()
    ours, _ = accelerated(model)
    ours.compile(backend="aot_eager", fullgraph=True)
    assert_equal(ours, model, run)


def test_zero3_gathers_whole_blocks() -> None:
    model = vit(depth=1)
    accelerate(model)
    gathered: set[nn.Parameter] = set()
    read: list[nn.Module] = [m for m in model.modules() if getattr(m, "_z3_leaf", False)]
    assert read == [model.blocks[0]]
    model.blocks[0].register_forward_pre_hook(lambda called, _: gathered.update(called.parameters()))
    run(model)
    assert gathered == set(model.blocks[0].parameters())
