"""The masked autoencoder against plain PyTorch, which keeps all patches in their places, as in He et al. 2022."""

import pytest
import torch
import torch.nn.functional as F

from fastvit_engine.config import Config
from fastvit_engine.models import build_for_training, build_vit, is_for_pretraining, parameter_count
from fastvit_engine.models.positions import sincos_positions

MODEL = {"name": "Ti/4", "image_size": 16, "width": 24, "depth": 2, "heads": 2, "num_classes": 0, "pool": "gap"}
MAE = {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 4}
BATCH, PATCHES, MASKED = 3, 16, 12


def config_of(**model) -> Config:
    return Config.model_validate({"model": MODEL | model, "train": {"objective": "mae"}, "mae": MAE})


def randomised(config: Config):
    torch.manual_seed(1)
    model = build_for_training(config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def split(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Visible and masked patches of each image."""
    orders = torch.stack([torch.randperm(PATCHES, generator=torch.Generator().manual_seed(seed + n)) for n in range(3)])
    return orders[:, MASKED:], orders[:, :MASKED]


def plain_block(x, weights, heads):
    def linear(name, value):
        return F.linear(value, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name, value):
        return F.layer_norm(value, value.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    q, k, v = linear("attn.qkv", norm("norm1", x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    attention = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v
    x = x + linear("attn.proj", attention.transpose(1, 2).flatten(2))
    return x + linear("mlp.fc2", F.gelu(linear("mlp.fc1", norm("norm2", x))))


def plain_autoencoder(model, images, visible):
    """Predictions of all patches, in their places [B, N, P * P * 3]."""
    state = dict(model.named_parameters())

    def inside(prefix):
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    config, prefix = model.config, model.shape.prefix
    patches = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4)
    patches = patches.flatten(2).transpose(1, 2)
    table = state["pos_embed"]
    own = table.shape[1] - PATCHES  # rows of the class token
    patches = patches + table[:, own:]
    rows = torch.arange(BATCH)[:, None]
    first = []
    if config.pool == "cls":
        first.append((state["cls_token"] + table[:, :own].sum(1, keepdim=True)).expand(BATCH, -1, -1))
    if config.registers:
        first.append(state["reg_token"].expand(BATCH, -1, -1))
    x = torch.cat([*first, patches[rows, visible]], dim=1)
    for index in range(2):
        x = plain_block(x, inside(f"blocks.{index}."), 2)
    x = F.layer_norm(x, x.shape[-1:], state["norm.weight"], state["norm.bias"], 1e-6)
    x = F.linear(x, state["decoder.embed.weight"], state["decoder.embed.bias"])
    whole = state["mask_token"].expand(BATCH, PATCHES, -1).clone()
    whole[rows, visible] = x[:, prefix:]
    x = torch.cat([x[:, :prefix], whole + state["decoder.pos_embed"]], dim=1)
    for index in range(2):
        x = plain_block(x, inside(f"decoder.blocks.{index}."), 4)
    x = F.layer_norm(x, x.shape[-1:], state["decoder.norm.weight"], state["decoder.norm.bias"], 1e-6)
    return F.linear(x[:, prefix:], state["decoder.head.weight"], state["decoder.head.bias"])


@pytest.mark.parametrize("changes", [{}, {"pool": "cls", "pos_embed": "sincos_2d"}, {"pool": "cls", "registers": 2}])
def test_predictions_and_gradients_are_those_of_plain_pytorch(changes):
    model, (visible, masked) = randomised(config_of(**changes)), split()
    images = torch.randn(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    wanted = torch.randn(BATCH, MASKED, 48, generator=torch.Generator().manual_seed(3))
    gradients = []
    for found in (
        model(images, visible, masked),
        plain_autoencoder(model, images, visible)[torch.arange(BATCH)[:, None], masked],
    ):
        model.zero_grad()
        (found - wanted).square().mean().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        gradients.append((found.detach(), grads))
    (ours, own), (theirs, expected) = gradients
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert own.keys() == expected.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in own.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_the_encoder_sees_nothing_of_the_masked_patches():
    model, (visible, masked) = randomised(config_of()), split()
    images = torch.randn(BATCH, 3, 4, 4, 4, 4)  # [B, 3, h, P, w, P]
    grid = images.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).clone()  # [B, N, 3, P, P]
    grid[torch.arange(BATCH)[:, None], masked] = 7.0
    others = grid.unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2, 5)
    found = [model(pixels.reshape(BATCH, 3, 16, 16), visible, masked) for pixels in (images, others)]
    assert torch.equal(*found)


def test_without_indices_it_represents_images_as_its_encoder_does():
    config = config_of()
    model = randomised(config).eval()
    encoder = build_vit(config.model, mean=config.data.mean, std=config.data.std).eval()
    kept = {name: value for name, value in model.state_dict().items() if not is_for_pretraining(name)}
    encoder.load_state_dict(kept)  # which refuses any name too many or too few
    images = torch.randint(0, 256, (BATCH, 16, 16, 3), dtype=torch.uint8)
    assert torch.equal(model(images), encoder(images)) and model(images).shape == (BATCH, 24)


def test_what_is_added_is_the_mask_token_and_the_decoder():
    config = config_of()
    model = build_for_training(config)
    added = {name.partition(".")[0] for name, _ in model.named_parameters() if is_for_pretraining(name)}
    assert added == {"mask_token", "decoder"}
    assert parameter_count(config.model, config.pretraining) > parameter_count(config.model)
    table = model.decoder.pos_embed
    assert not table.requires_grad and torch.equal(table.data, sincos_positions(model.decoder.shape))


def test_the_blocks_of_the_decoder_recompute_what_those_of_the_encoder_do():
    model = build_for_training(config_of())
    model.recompute("all")
    assert {block.recompute for block in (*model.blocks, *model.decoder.blocks)} == {"all"}
