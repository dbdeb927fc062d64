"""EVA, EVA-02 and DINOv3 of timm, with rotary position embedding, are fused and equal."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from fastvit_kernels import accelerate
from tests.in_full import in_full, only_in_full
from tests.kernels.integrations.equality import accelerated, assert_equal, randomised, rows

eva = pytest.importorskip("timm.models.eva", reason="timm is not installed")

IMAGES = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(5))  # 2 x 3 patches of 8
ROTARY = "layer_norm + rotary + attention"
MLP, GATED = f"{ROTARY} + layer_norm_mlp", f"{ROTARY} + layer_norm_swiglu"
DINOV3 = {
    "rope_type": "dinov3",
    "rope_rotate_half": True,
    "use_abs_pos_emb": False,
    "num_reg_tokens": 4,
    "qkv_bias": False,
    "init_values": 0.1,
}


def model_of(**options: Any) -> nn.Module:
    settings = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return randomised(eva.Eva(**(settings | {"use_rot_pos_emb": True} | options)))


def run(model: nn.Module) -> torch.Tensor:
    return model(IMAGES)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (DINOV3, MLP),
        (DINOV3 | {"swiglu_mlp": True, "swiglu_align_to": 8}, GATED),
        ({"swiglu_mlp": True, "drop_path_rate": 0.5}, GATED),
        ({"swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False}, ROTARY),
        in_full({"qk_norm": True, "scale_mlp": False, "proj_drop_rate": 0.3}, MLP),
        in_full({"num_reg_tokens": 2, "class_token": False, "global_pool": "avg"}, MLP),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_fused_and_equal(calls: Counter[str], options: dict[str, Any], found: str) -> None:
    model = model_of(**options).train()
    ours, acceleration = accelerated(model)
    assert rows(acceleration)["blocks.1"][0] == found
    assert ("mlp.norm is LayerNorm" in rows(acceleration)["blocks.1"][1]) == (found == ROTARY)
    assert list(ours.state_dict()) == list(model.state_dict())
    assert_equal(ours, model, run)
    assert calls["rotary_qk_norm"] == calls["attention"] == 2
    assert_equal(ours.eval(), model.eval(), run)
    acceleration.undo()
    calls.clear()
    assert torch.equal(run(ours), run(model)) and not calls


def test_without_rotation_a_block_is_one_operator(calls: Counter[str]) -> None:
    model = model_of(use_rot_pos_emb=False)
    ours, acceleration = accelerated(model)
    assert rows(acceleration)["blocks.1"] == ("block", "")
    assert_equal(ours, model, run)
    assert calls["transformer_block"] == 2 and not calls["rotary_qk_norm"]
    x, rope = torch.randn(2, 7, 32), torch.randn(6, 32)
    assert_equal(ours.blocks[0], model.blocks[0], lambda block: block(x, rope))  # what nobody foresaw is right too
    assert calls["rotary_qk_norm"] == 1
    normed, told = accelerated(model_of(use_rot_pos_emb=False, qk_norm=True, scale_mlp=False))
    assert rows(told)["blocks.1"] == (MLP, "")
    assert rows(accelerate(copy.deepcopy(ours)))["blocks.1"] == ("block", "")


@only_in_full
@pytest.mark.parametrize("options", [{"qk_norm": True, "swiglu_mlp": True}, {"use_rot_pos_emb": False}])
def test_compiled_is_equal(options: dict[str, Any], implementation: str) -> None:
    model = model_of(**(DINOV3 | {"depth": 1} | options))
    ours, _ = accelerated(model)
    ours.compile(backend="aot_eager", fullgraph=True)
    assert_equal(ours, model, run)


def test_what_is_not_fused_says_why_and_is_equal(calls: Counter[str]) -> None:
    inner = model_of(scale_attn_inner=True)
    ours, acceleration = accelerated(inner)
    assert rows(acceleration)["blocks.0"] == ("layer_norm_mlp", "no attention_block: attn.norm is LayerNorm")
    assert_equal(ours, inner, run)
    mixed = model_of(rope_type="mixed", rope_grid_offset=0.0)  # angles of each head, which learn
    ours, _ = accelerated(mixed)
    assert_equal(ours, mixed, run)
    assert not calls["rotary_qk_norm"]


def test_masks_and_hooks_are_honoured(calls: Counter[str]) -> None:
    block = randomised(eva.EvaBlock(32, 2, init_values=0.1))
    ours, _ = accelerated(block)
    x, rope, mask = torch.randn(2, 7, 32), torch.randn(6, 32), torch.zeros(7, 7).masked_fill(torch.eye(7) > 0, -10.0)
    assert_equal(ours, block, lambda m: m(x, rope=rope, attn_mask=mask))
    assert not calls["rotary_qk_norm"]
    seen = []
    ours.attn.q_norm.register_forward_hook(lambda *_: seen.append(1))
    assert_equal(ours, block, lambda m: m(x, rope))
    assert seen and not calls["rotary_qk_norm"]


def test_half_precision(calls: Counter[str]) -> None:
    model = model_of(**DINOV3).to(torch.bfloat16)
    ours, theirs = accelerated(model)[0](IMAGES.bfloat16()), model(IMAGES.bfloat16())
    assert calls["rotary_qk_norm"] == 2 and ours.dtype == torch.bfloat16
    assert (ours - theirs).norm() <= 0.02 * theirs.norm()
    model = model_of(**DINOV3)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = accelerated(model)[0](IMAGES), model(IMAGES)
    assert ours.dtype == theirs.dtype and (ours - theirs).norm() <= 0.02 * theirs.norm()


def test_the_blocks_of_post_norm_are_left_alone() -> None:
    model = model_of(use_post_norm=True)
    assert rows(accelerate(model))["blocks.0"] == ("", "no fused form of EvaBlockPostNorm")
