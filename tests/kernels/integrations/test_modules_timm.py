"""The modules load the weights of timm's, and timm's load theirs; timm's blocks run the kernels of ours."""

import pytest
import torch
from torch import nn

from fastvit_kernels import FusedBlock, FusedPatchEmbed, accelerate
from fastvit_kernels.block import op as block_op
from fastvit_kernels.swiglu import op as swiglu_op

timm = pytest.importorskip("timm")
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


@pytest.mark.parametrize("mlp", ["Mlp", "SwiGLUPacked"])
def test_accelerated_block_runs_the_kernels(mlp: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    op, options = block_op, {}
    if mlp == "SwiGLUPacked":
        op, options = swiglu_op, {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU}
    registered = op.call_operator
    monkeypatch.setattr(op, "call_operator", lambda *args: calls.append(1) or registered(*args))
    block, x = randomised(timm_vit.Block(16, 2, qkv_bias=True, init_values=0.1, **options)), torch.randn(1, 3, 16)
    expected = block(x)
    expected_gradients = torch.autograd.grad(expected.sin().sum(), list(block.parameters()))
    accelerate(block)
    result = block(x)
    torch.testing.assert_close(result, expected)
    for gradient, wanted in zip(
        torch.autograd.grad(result.sin().sum(), list(block.parameters())), expected_gradients, strict=True
    ):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
    assert len(calls) == (implementation == "triton")
