"""Blocks that keep their input alone compute what they would have computed, and keep less."""

import pytest
import torch

from fastvit_engine.config import ModelConfig
from fastvit_engine.models import build_vit
from fastvit_engine.models.activation_checkpointing import HostCopy
from fastvit_kernels import dispatch

SMALL = {"name": "Ti/4", "image_size": 16, "width": 32, "depth": 4, "heads": 2, "num_classes": 5}


def model_of(**given):
    torch.manual_seed(0)
    model = build_vit(ModelConfig(**SMALL | given), mean=(0.5,) * 3, std=(0.5,) * 3)
    torch.nn.init.normal_(model.head.weight, std=0.1)  # it is zero at first, and would hide the blocks
    return model.train()


def gradients(model, images):
    torch.manual_seed(1)  # of dropout
    model.zero_grad()
    logits = model(images)
    (logits**2).sum().backward()
    return [logits.detach(), *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)]


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"pool": "gap", "dropout": 0.2, "drop_path": 0.3},
        {"pos_embed": "learned_2d", "pos_embed_at": "every_layer", "layer_scale": 0.1},
        {"pos_embed": "relative", "pool": "map"},
    ],
    ids=str,
)
def test_gradients_are_the_same(images, given, count, offload):
    """To the bit; but PyTorch's attention with a bias computes otherwise where nothing is kept for a backward pass."""
    model = model_of(**given)
    expected = gradients(model, images)
    model.checkpoint_blocks(count, offload=offload)
    for ours, plain in zip(gradients(model, images), expected, strict=True):
        if given.get("pos_embed") == "relative":
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(ours, plain)


def test_gradients_of_the_kernels_are_the_same_to_the_bit(images):
    if not dispatch.INTERPRETED:
        pytest.skip("does not apply: kernels need a GPU or Triton's interpreter")
    model = model_of(drop_path=0.3, depth=2)
    with dispatch.using("triton"):
        expected = gradients(model, images)
        model.checkpoint_blocks(2)
        assert all(map(torch.equal, gradients(model, images), expected))


def test_a_block_computes_again_in_the_backward_pass_alone(images):
    model, calls = model_of(), []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
    model.checkpoint_blocks(2)
    gradients(model, images)
    assert calls == [0, 1, 2, 3, 1, 0]  # of the first two
    calls.clear()
    with torch.no_grad():
        model(images)
    assert calls == [0, 1, 2, 3]


@pytest.mark.parametrize("offload", [False, True])
def test_blocks_learn_whose_input_needs_no_gradient(images, offload):
    model = model_of(pool="gap", pos_embed="sincos_2d")
    model.patch_embed.requires_grad_(False)
    expected = gradients(model, images)
    model.checkpoint_blocks(4, offload=offload)
    assert all(map(torch.equal, gradients(model, images), expected))


def test_a_copy_on_the_host_comes_back_with_its_values():
    tensor = torch.randn(2, 3)
    first = HostCopy(tensor)
    second = HostCopy(tensor + 1, before=first)
    for copy, value in ((second, tensor + 1), (first, tensor)):
        back = copy.load()
        assert torch.equal(back, value) and back.data_ptr() != tensor.data_ptr()
