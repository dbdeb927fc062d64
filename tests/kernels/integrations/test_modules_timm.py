"""The modules load the weights of timm's, and timm's load theirs."""

import pytest
import torch
from torch import nn

from fastvit_kernels import FusedBlock, FusedPatchEmbed

timm_vit = pytest.importorskip("timm.models.vision_transformer")


@torch.no_grad()
def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.normal_(std=0.3)
    return module.eval()


@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_block_exchanges_weights_with_timm(layer_scale: float | None) -> None:
    theirs = randomised(timm_vit.Block(16, 2, qkv_bias=True, init_values=layer_scale))
    ours = FusedBlock(16, 2, 64, layer_scale=layer_scale, eps=theirs.norm1.eps)
    x = torch.randn(2, 5, 16)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    theirs.load_state_dict(randomised(ours).state_dict())
    torch.testing.assert_close(ours(x), theirs(x))


def test_patch_embed_exchanges_weights_with_timm() -> None:
    theirs = randomised(timm_vit.PatchEmbed(img_size=8, patch_size=4, embed_dim=16))
    ours, images = FusedPatchEmbed(4, 16, (0.5,) * 3, (0.5,) * 3), torch.randn(2, 3, 8, 8)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(images), theirs(images))
    theirs.load_state_dict(randomised(ours).state_dict())
    torch.testing.assert_close(ours(images), theirs(images))
