from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from tests.kernels.integrations.equality import WHOLE, accelerated, assert_equal, randomised, relative, rows

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")

IMAGES = torch.randn(3, 3, 24, 40, generator=torch.Generator().manual_seed(5))
CAUSAL = torch.full((5, 5), -torch.inf).triu(1)


def tower(**options: Any) -> nn.Module:
    settings = {"image_size": (24, 40), "patch_size": 8, "width": 24, "layers": 2, "heads": 3, "mlp_ratio": 2.7}
    return randomised(open_clip.transformer.VisionTransformer(**(settings | {"output_dim": 5} | options)))


def run(model: nn.Module) -> torch.Tensor:
    return model(IMAGES)


@pytest.mark.parametrize(
    "options",
    [{}, {"ls_init_value": 0.1}, {"pool_type": "avg"}, {"norm_layer": open_clip.transformer.LayerNormFp32}],
    ids=lambda value: ",".join(value),
)
def test_towers_are_fused_and_equal(calls: Counter[str], options: dict[str, Any]) -> None:
    model = tower(**options).train()
    ours, acceleration = accelerated(model)
    assert_equal(ours, model, run)
    assert calls == {"patch_embed": 1, "transformer_block": 2, "layer_norm": 2}
    assert rows(acceleration)["transformer.resblocks.1"] == WHOLE
    with torch.no_grad():
        assert relative(run(ours.eval()), run(model.eval())) <= 1e-5  # PyTorch's own fast path of attention


def test_quick_gelu_stays(calls: Counter[str]) -> None:
    model = tower(act_layer=open_clip.transformer.QuickGELU)
    ours, acceleration = accelerated(model)
    found = ("attention_block", "no layer_norm_mlp: activation QuickGELU")
    assert rows(acceleration)["transformer.resblocks.0"] == found
    assert_equal(ours, model, run)
    assert calls["attention_block"] == 2 and not calls.keys() & {"transformer_block", "layer_norm_mlp"}


def test_custom_blocks_are_left_alone() -> None:
    model = tower(qk_norm=True)
    ours, acceleration = accelerated(model)
    found = ("", "no fused form of CustomResidualAttentionBlock")
    assert rows(acceleration)["transformer.resblocks.0"] == found
    assert_equal(ours, model, run)


def test_cross_attention_keeps_its_attention(calls: Counter[str]) -> None:
    model = randomised(open_clip.transformer.ResidualAttentionBlock(24, 3, is_cross_attention=True))
    ours, acceleration = accelerated(model)
    assert "no attention_block: the block has a part 'ln_1_kv'" in rows(acceleration)[""][1]
    queries, keys = torch.randn(2, 5, 24), torch.randn(2, 7, 24)
    assert_equal(ours, model, lambda m: m(queries, keys, keys))


def test_keys_and_values_of_their_own_are_honoured(calls: Counter[str]) -> None:
    block = randomised(open_clip.transformer.ResidualAttentionBlock(24, 3))
    ours, _ = accelerated(block)
    queries, keys = torch.randn(2, 5, 24), torch.randn(2, 7, 24)
    assert_equal(ours, block, lambda m: m(queries, keys, keys))
    assert not calls.keys() & {"transformer_block", "attention_block"}


def test_sequence_first_blocks_keep_their_attention(calls: Counter[str]) -> None:
    block = randomised(open_clip.transformer.ResidualAttentionBlock(24, 3, batch_first=False))
    ours, acceleration = accelerated(block)
    assert rows(acceleration)[""] == ("layer_norm_mlp", "no attention_block: attn takes the batch second")
    x = torch.randn(5, 2, 24)
    assert_equal(ours, block, lambda m: m(x))


def test_a_whole_clip_model(calls: Counter[str]) -> None:
    """The text tower has a causal mask, and runs as whole blocks too."""
    model = randomised(
        open_clip.model.CLIP(
            embed_dim=16,
            vision_cfg={"image_size": 24, "patch_size": 8, "width": 24, "layers": 1, "head_width": 8},
            text_cfg={"context_length": 9, "vocab_size": 50, "width": 24, "heads": 3, "layers": 1},
        )
    )
    ours, acceleration = accelerated(model)
    images, text = torch.randn(2, 3, 24, 24), torch.randint(1, 50, (2, 9))

    def logits(m: nn.Module) -> torch.Tensor:
        image, words, scale = m(images, text)
        return scale * image @ words.T

    assert_equal(ours, model, logits)
    assert calls["transformer_block"] == 2 and not calls.keys() & {"attention_block", "layer_norm_mlp"}
    assert rows(acceleration)["token_embedding"] == ("", "no fused form of Embedding")


@pytest.mark.parametrize(
    ("mask", "fused"),
    [
        (CAUSAL, 2),
        (CAUSAL.masked_fill(torch.eye(5).roll(2).bool(), 0.5), 0),
        (CAUSAL.T, 0),
        (CAUSAL.expand(6, 5, 5), 0),  # one for each head of each image
        (CAUSAL.isinf(), 0),
    ],
    ids=["causal", "causal but for one number", "backwards", "per head", "boolean"],
)
def test_only_causal_masks_are_fused(mask: torch.Tensor, fused: int, calls: Counter[str]) -> None:
    model = randomised(open_clip.transformer.Transformer(width=24, layers=1, heads=3, batch_first=True))
    ours, _ = accelerated(model)
    x = torch.randn(2, 5, 24)
    if mask.dtype == torch.bool:  # open_clip makes numbers of it, 1 for what a boolean mask would hide
        assert torch.equal(ours(x, attn_mask=mask), model(x, attn_mask=mask))
        return
    assert_equal(ours, model, lambda m: m(x, attn_mask=mask[:5, :5] if mask.ndim == 2 else mask))
    mask = mask.clone()
    assert_equal(ours, model, lambda m: m(x, attn_mask=mask))
    assert calls["transformer_block"] == fused and not calls["attention_block"]


def test_a_changed_mask_is_looked_at_again(calls: Counter[str]) -> None:
    model = randomised(open_clip.transformer.Transformer(width=24, layers=1, heads=3, batch_first=True))
    ours, _ = accelerated(model)
    x, mask = torch.randn(2, 4, 24), CAUSAL.clone()
    assert_equal(ours, model, lambda m: m(x, attn_mask=mask[:4, :4]))
    mask[3, 0] = -1.0
    assert_equal(ours, model, lambda m: m(x, attn_mask=mask[:4, :4]))
    assert calls["transformer_block"] == 1


def test_a_compiled_text_tower_is_equal() -> None:
    model = randomised(open_clip.transformer.Transformer(width=24, layers=1, heads=3, batch_first=True))
    ours, _ = accelerated(model)
    ours.compile(backend="eager", fullgraph=True)
    x = torch.randn(2, 5, 24)
    assert_equal(ours, model, lambda m: m(x, attn_mask=CAUSAL))


def test_checkpointing_and_compiling() -> None:
    model = tower(layers=1)
    model.set_grad_checkpointing()
    ours, _ = accelerated(model)
    assert_equal(ours, model, run)
    model.set_grad_checkpointing(False)
    ours.set_grad_checkpointing(False)
    ours.compile(backend="eager", fullgraph=True)
    assert_equal(ours, model, run)


def test_undo() -> None:
    model = tower()
    ours, acceleration = accelerated(model)
    acceleration.undo()
    assert [type(m) for m in ours.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(run(ours), run(model))
