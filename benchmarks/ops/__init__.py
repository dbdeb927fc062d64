"""One file per operation: its inputs, its plain formulation, its work, and who can run it."""

from benchmarks.ops import attention, blocks, cross_entropy, fp8, layer_norm, mlp, optimizer, patch_embed
from benchmarks.registry import Op


def all_ops() -> list[Op]:
    """Every operation, those with most to gain first."""
    return [
        attention.ATTENTION,
        mlp.MLP,
        layer_norm.ADD_LAYER_NORM,
        layer_norm.LAYER_NORM,
        blocks.BLOCK,
        blocks.ATTENTION_BLOCK,
        patch_embed.PATCH_EMBED,
        cross_entropy.SOFT_CROSS_ENTROPY,
        cross_entropy.CROSS_ENTROPY,
        mlp.MLP_TANH,
        optimizer.ADAMW,
        fp8.FP8_LINEAR,
    ]
