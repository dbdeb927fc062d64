import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit_engine.config import ModelConfig
from fastvit_engine.errors import UserError
from fastvit_engine.models import VisionTransformer, build_vit, model_title, parameter_count

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
SMALL = ModelConfig(name="Ti/4", image_size=12, num_classes=7, width=12, depth=3, heads=3)


def small(**changes: object) -> VisionTransformer:
    torch.manual_seed(0)
    return build_vit(SMALL.model_copy(update=changes), mean=MEAN, std=STD)


def randomise(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


# g/14 as Zhai et al. 2022 train it: attention pooling, no class token, and the classes of JFT-3B.
_WIDTH, _MLP = 1408, 6144
_MLP_BLOCK = 2 * _WIDTH * _MLP + _MLP + _WIDTH
_ATTENTION = 4 * (_WIDTH + 1) * _WIDTH
_BLOCKS = 40 * (_ATTENTION + _MLP_BLOCK + 4 * _WIDTH)
_ENDS = (14 * 14 * 3 + 1) * _WIDTH + 256 * _WIDTH + 2 * _WIDTH  # patches, positions, the norm after the blocks
MAP_G14 = _BLOCKS + _ENDS + _WIDTH + _ATTENTION + 2 * _WIDTH + _MLP_BLOCK + (_WIDTH + 1) * 29_593


@pytest.mark.parametrize(
    ("name", "count", "changes"),
    [
        ("Ti/16", 5_717_416, {}),
        ("S/16", 22_050_664, {}),
        ("S/32", 22_878_952, {}),
        ("B/8", 86_576_872, {}),
        ("B/16", 86_567_656, {}),
        ("B/32", 88_224_232, {}),
        ("B/16", 86_566_120, {"pool": "gap"}),
        ("B/16", 92_884_224, {"pool": "map", "num_classes": 0}),  # of SigLIP
        ("B/16", 103_186_515, {"head": "mlp", "num_classes": 21_843}),
        ("L/14", 304_203_752, {}),
        ("L/16", 304_326_632, {}),
        ("L/32", 306_535_400, {}),
        ("L/16", 326_740_307, {"head": "mlp", "num_classes": 21_843}),
        ("H/14", 632_045_800, {}),
        ("H/14", 660_385_363, {"head": "mlp", "num_classes": 21_843}),
        ("g/14", 1_012_611_432, {}),
        ("G/14", 1_844_440_680, {}),
        ("g/14", MAP_G14, {"pool": "map", "num_classes": 29_593}),  # of Scaling Vision Transformers
        ("So400m/14", 427_680_704, {"pool": "map", "num_classes": 0}),  # of SigLIP, as timm counts it
        ("So400m/14", 413_597_656, {}),
    ],
)
def test_parameter_counts(name: str, count: int, changes: dict[str, object]) -> None:
    assert parameter_count(ModelConfig(name=name, **changes)) == count


BLOCK_NAMES = [
    f"{layer}.{kind}"
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
]
ATTENTION_POOL = [
    "attn_pool.latent",
    *(
        f"attn_pool.{layer}.{kind}"
        for layer in ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ),
]
ENDS = ["patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("changes", "extra", "block_names"),
    [
        ({}, ["cls_token", "pos_embed"], BLOCK_NAMES),
        ({"pool": "gap"}, ["pos_embed"], BLOCK_NAMES),
        ({"pool": "map"}, ["pos_embed", *ATTENTION_POOL], BLOCK_NAMES),
        ({"registers": 4}, ["cls_token", "reg_token", "pos_embed"], BLOCK_NAMES),
        ({"registers": 4, "pool": "gap"}, ["reg_token", "pos_embed"], BLOCK_NAMES),
        ({"head": "mlp"}, ["cls_token", "pos_embed", "pre_logits.fc.weight", "pre_logits.fc.bias"], BLOCK_NAMES),
        ({"layer_scale": 0.1}, ["cls_token", "pos_embed"], [*BLOCK_NAMES, "ls1.gamma", "ls2.gamma"]),
    ],
)
def test_state_has_the_names_of_timm(changes: dict[str, object], extra: list[str], block_names: list[str]) -> None:
    expected = {*ENDS, *extra, *(f"blocks.{index}.{name}" for index in range(3) for name in block_names)}
    state = small(**changes).state_dict()
    assert set(state) == expected
    has_row = changes.get("pool", "cls") == "cls" and "registers" not in changes  # of the class token
    assert list(state["pos_embed"].shape) == [1, 9 + has_row, 12]
    assert list(state["patch_embed.proj.weight"].shape) == [12, 3, 4, 4]
    assert list(state["blocks.2.attn.qkv.weight"].shape) == [36, 12]


class PlainEncoder(nn.Module):
    """A pre-norm Transformer encoder of PyTorch's own layers, over the same weights."""

    def __init__(self, model: VisionTransformer, activation: nn.Module) -> None:
        super().__init__()
        state = model.state_dict()
        self.pool, self.registers = model.config.pool, model.config.registers
        self.activation = activation
        self.eps = model.config.layer_norm_eps
        self.weights = nn.ParameterDict(
            {name.replace(".", "/"): value.clone() for name, value in state.items() if not name.startswith("blocks.")}
        )
        self.layers = nn.ModuleList()
        for index in range(3):
            layer = nn.TransformerEncoderLayer(
                12,
                3,
                48,
                0.0,
                activation,
                model.config.layer_norm_eps,
                batch_first=True,
                norm_first=True,
                dtype=torch.float64,
            )
            names = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.", "linear1.": "mlp.fc1."}
            names |= {"linear2.": "mlp.fc2.", "norm1.": "norm1.", "norm2.": "norm2."}
            layer.load_state_dict(
                {
                    theirs + kind: state[f"blocks.{index}.{ours}{kind}"].clone()
                    for theirs, ours in names.items()
                    for kind in ("weight", "bias")
                }
            )
            self.layers.append(layer)

    def forward(self, images: Tensor) -> Tensor:
        w = self.weights
        x = F.conv2d(images, w["patch_embed/proj/weight"], w["patch_embed/proj/bias"], stride=4)
        x = x.flatten(2).transpose(1, 2)
        if self.registers:
            x = x + w["pos_embed"]
            x = torch.cat([w["reg_token"].expand(len(images), -1, 12), x], dim=1)
        if self.pool == "cls":
            x = torch.cat([w["cls_token"].expand(len(images), 1, 12), x], dim=1)
        x = x if self.registers else x + w["pos_embed"]
        for layer in self.layers:
            x = layer(x)
        x = F.layer_norm(x, (12,), w["norm/weight"], w["norm/bias"], self.eps)
        patches = x[:, self.registers + (self.pool == "cls") :]
        pool = {"map": self.pooled_by_attention, "gap": lambda patches: patches.mean(dim=1), "cls": lambda _: x[:, 0]}
        x = pool[self.pool](patches)
        if "pre_logits/fc/weight" in w:
            x = torch.tanh(F.linear(x, w["pre_logits/fc/weight"], w["pre_logits/fc/bias"]))
        return F.linear(x, w["head/weight"], w["head/bias"])

    def pooled_by_attention(self, x: Tensor) -> Tensor:
        own = [name for name in self.weights if name.startswith("attn_pool/")]
        w = {name.removeprefix("attn_pool/"): self.weights[name] for name in own}
        x, _ = F.multi_head_attention_forward(
            w["latent"].expand(len(x), 1, 12).transpose(0, 1),
            x.transpose(0, 1),
            x.transpose(0, 1),
            12,
            3,
            torch.cat([w["q/weight"], w["kv/weight"]]),
            torch.cat([w["q/bias"], w["kv/bias"]]),
            None,
            None,
            False,
            0.0,
            w["proj/weight"],
            w["proj/bias"],
            need_weights=False,
        )
        y = F.layer_norm(x[0], (12,), w["norm/weight"], w["norm/bias"], self.eps)
        y = self.activation(F.linear(y, w["mlp/fc1/weight"], w["mlp/fc1/bias"]))
        return x[0] + F.linear(y, w["mlp/fc2/weight"], w["mlp/fc2/bias"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pool": "gap"},
        {"pool": "map"},
        {"pool": "map", "head": "mlp", "activation": "gelu_tanh", "layer_norm_eps": 0.05},
        {"registers": 2},
        {"registers": 2, "pool": "gap"},
        {"registers": 3, "pool": "map"},
        {"head": "mlp"},
        {"activation": "gelu_tanh"},
        {"layer_norm_eps": 0.05},
    ],
    ids=lambda c: str(c or "default"),
)
def test_equals_plain_encoder(changes: dict[str, object]) -> None:
    model = randomise(small(**changes).double())
    form = "tanh" if changes.get("activation") == "gelu_tanh" else "none"
    plain = PlainEncoder(model, nn.GELU(approximate=form))
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    logits, expected = model(images), plain(images)
    assert torch.allclose(logits, expected, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn_like(logits)
    logits.backward(cotangent)
    expected.backward(cotangent)
    ours = dict(model.named_parameters())
    pairs = [(ours[name.replace("/", ".")], parameter) for name, parameter in plain.weights.items()]
    for index, layer in enumerate(plain.layers):
        pairs += [
            (ours[f"blocks.{index}.attn.qkv.weight"], layer.self_attn.in_proj_weight),
            (ours[f"blocks.{index}.attn.qkv.bias"], layer.self_attn.in_proj_bias),
            (ours[f"blocks.{index}.attn.proj.weight"], layer.self_attn.out_proj.weight),
            (ours[f"blocks.{index}.mlp.fc1.weight"], layer.linear1.weight),
            (ours[f"blocks.{index}.mlp.fc2.bias"], layer.linear2.bias),
            (ours[f"blocks.{index}.norm1.weight"], layer.norm1.weight),
            (ours[f"blocks.{index}.norm2.bias"], layer.norm2.bias),
        ]
    for mine, theirs in pairs:
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-8, atol=1e-10)


def test_pixels_are_normalised_with_mean_and_std() -> None:
    model = randomise(small())
    pixels = torch.randint(0, 256, (2, 12, 12, 3), dtype=torch.uint8)
    normalised = (pixels / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(model(pixels), model(normalised.permute(0, 3, 1, 2)), atol=1e-5)


def test_features_and_head_make_the_model() -> None:
    model, images = randomise(small()), torch.randn(2, 3, 12, 12)
    tokens = model.forward_features(images)
    assert tokens.shape == (2, 10, 12)
    torch.testing.assert_close(model.forward_head(tokens), model(images))  # the last block computes one token
    assert torch.equal(model.head(model.represent(images)), model(images))


@pytest.mark.parametrize("changes", [{}, {"head": "mlp"}, {"pool": "gap"}, {"pool": "map"}], ids=str)
def test_without_a_head_the_model_gives_representations(changes):
    model, images = randomise(small(num_classes=0, **changes)), torch.randn(2, 3, 12, 12)
    assert not [name for name in model.state_dict() if name.startswith("head.")]
    assert model(images).shape == (2, 12) and torch.equal(model(images), model.represent(images))
    assert parameter_count(model.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "changes",
    [{}, {"registers": 2}, {"pos_embed": "relative"}, {"pos_embed_at": "every_layer"}, {"pos_embed": "none"}],
    ids=str,
)
def test_attention_maps_are_the_probabilities_that_the_blocks_attend_with(changes):
    model, images = randomise(small(**changes)).eval(), torch.randn(2, 3, 12, 12)
    seen: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    maps = model.attention_maps(images)
    tokens = 10 + changes.get("registers", 0)
    assert maps.shape == (3, 2, 3, tokens, tokens) and maps.dtype == torch.float32 and not maps.requires_grad
    assert torch.allclose(maps.sum(dim=-1), torch.ones(3, 2, 3, tokens), atol=1e-5)
    for block, tokens, probabilities in zip(model.blocks, list(seen), maps, strict=True):
        values = block.attn.qkv(block.norm1(tokens))[..., 24:].unflatten(-1, (3, 4)).transpose(1, 2)  # [B, H, N, d]
        attended = (probabilities @ values).transpose(1, 2).flatten(2)
        after = tokens + block.attn.proj(attended)
        expected = after + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(after))))
        torch.testing.assert_close(block(tokens), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.bfloat16().attention_maps(images).sum().isfinite(), torch.tensor(True))


@pytest.mark.parametrize("changes", [{}, {"pool": "map"}, {"registers": 2}], ids=str)
def test_bfloat16_model_trains_on_pixels(changes: dict[str, object]) -> None:
    model = randomise(small(dropout=0.1, drop_path=0.1, layer_scale=0.1, **changes)).bfloat16()
    logits = model(torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8))
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("changes", [{"registers": 2, "layer_scale": 0.5, "drop_path": 0.5}, {"depth": 1}], ids=str)
def test_last_block_for_the_class_token_alone_is_the_same_function(changes: dict[str, object]) -> None:
    model, images = randomise(small(**changes)).double(), torch.randn(4, 3, 12, 12).double()

    def outcome(of_all_tokens: bool) -> list[Tensor]:
        torch.manual_seed(1)  # of the dropped paths
        logits = model.forward_head(model.forward_features(images)) if of_all_tokens else model(images)
        return [logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))]

    for result, expected in zip(outcome(False), outcome(True), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("changes", [{}, {"pool": "gap"}, {"pool": "map"}, {"registers": 2}], ids=str)
def test_dropped_patches_are_not_seen(changes: dict[str, object]) -> None:
    """Whatever is in them; and all patches, in any order, make the model's own logits."""
    model, images = randomise(small(**changes)).double(), torch.randn(2, 3, 12, 12).double()
    visible = torch.tensor([[7, 2, 4], [0, 5, 1]])
    hidden = images.clone().unflatten(3, (3, 4)).unflatten(2, (3, 4))  # [2, 3, h, 4, w, 4]
    for image in range(2):
        for patch in set(range(9)) - set(visible[image].tolist()):
            hidden[image, :, patch // 3, :, patch % 3] = torch.randn(3, 4, 4).double()
    hidden = hidden.flatten(4, 5).flatten(2, 3)
    assert torch.equal(model(images, visible), model(hidden, visible))
    everything = torch.stack([torch.randperm(9), torch.randperm(9)])
    torch.testing.assert_close(model(images, everything), model(images))
    assert (model(images, visible) - model(images)).abs().max() > 1e-3


@pytest.mark.parametrize(("pool", "tokens"), [("cls", 1), ("gap", 9), ("map", 9)])
def test_tokens_that_the_head_does_not_read_are_computed_for_hooks_alone(pool: str, tokens: int) -> None:
    model, images = small(pool=pool), torch.randn(2, 3, 12, 12)
    seen: list[int] = []

    def look(*passed: Any) -> None:
        seen.append(passed[-1].shape[1])

    def move(*passed: Any) -> None:
        look(*passed)

    move.__module__ = "deepspeed.runtime.zero.parameter_offload"
    for hooked in (model.blocks, model.blocks[-1], model.norm):
        handle = hooked.register_forward_hook(partial(move))
        model(images)
        handle.remove()
        handle = hooked.register_forward_hook(look)
        model(images)
        handle.remove()
    assert seen == [tokens, 10 if pool == "cls" else 9] * 3


def test_last_block_compiles_without_graph_break() -> None:
    model, images = randomise(small(depth=2)), torch.randn(2, 3, 12, 12)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))


def test_drop_path_grows_linearly_and_dropout_reaches_every_block() -> None:
    model = small(drop_path=0.2, dropout=0.3)
    assert [block.drop_path for block in model.blocks] == pytest.approx([0.0, 0.1, 0.2])
    assert [block.dropout for block in model.blocks] == [0.3] * 3
    assert model.pos_drop.p == 0.3
    assert small(drop_path=0.2, depth=1).blocks[0].drop_path == 0


def test_dropout_after_position_embedding() -> None:
    model = randomise(small(dropout=0.5))
    seen: list[Tensor] = []
    model.blocks.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model(torch.randn(16, 3, 12, 12))
    assert (seen[0] == 0).float().mean().item() == pytest.approx(0.5, abs=0.06)  # 5 standard deviations of 1920 draws


def test_initial_weights() -> None:
    config = ModelConfig(
        name="Ti/8", image_size=32, num_classes=10, head="mlp", head_bias=-10, layer_scale=0.1, depth=2
    )
    torch.manual_seed(0)
    model = VisionTransformer(config, mean=MEAN, std=STD)
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)  # whatever init_weights forgets stays NaN
    model.init_weights()
    state = model.state_dict()
    assert not any(tensor.isnan().any() for tensor in state.values())

    assert not state["cls_token"].any() and not state["head.weight"].any()
    assert state["head.bias"].tolist() == [-10.0] * 10
    assert state["pos_embed"].std().item() == pytest.approx(0.02, rel=0.05)
    for name in ("patch_embed.proj", "pre_logits.fc"):
        weight = state[f"{name}.weight"]
        expected = 1 / math.sqrt(weight[0].numel())
        assert weight.std().item() == pytest.approx(expected, rel=0.02)
        assert weight.abs().max().item() <= 2 * expected / 0.879 < 3 * expected  # the normal is cut off
    for name in ("blocks.1.attn.proj", "blocks.0.mlp.fc1", "blocks.1.mlp.fc2"):
        fan_out, fan_in = state[f"{name}.weight"].shape
        check_xavier(state[f"{name}.weight"], fan_in + fan_out)
    for projection in state["blocks.0.attn.qkv.weight"].split(192):
        check_xavier(projection, 192 + 192)  # each of q, k, v on its own: not 192 + 576
    for name in ("blocks.0.mlp.fc1.bias", "blocks.1.mlp.fc2.bias"):
        assert state[name].std().item() == pytest.approx(1e-6, rel=0.2)
    for name in ("blocks.1.attn.qkv.bias", "blocks.0.attn.proj.bias", "patch_embed.proj.bias", "pre_logits.fc.bias"):
        assert not state[name].any()
    for name in ("norm", "blocks.0.norm1", "blocks.1.norm2"):
        assert (state[f"{name}.weight"] == 1).all() and not state[f"{name}.bias"].any()
    assert (state["blocks.1.ls1.gamma"] == 0.1).all() and (state["blocks.0.ls2.gamma"] == 0.1).all()


def test_registers_begin_small_and_unequal() -> None:
    registers = small(registers=4, width=384, heads=3).reg_token
    assert registers.std().item() == pytest.approx(1e-6, rel=0.1)
    assert len(torch.unique(registers[0], dim=0)) == 4


def test_initial_weights_of_attention_pooling() -> None:
    """Those of big_vision, in which the query, [1, 1, D], has one input and D outputs."""
    config = ModelConfig(name="Ti/8", image_size=32, num_classes=10, pool="map", width=768, depth=1, heads=3)
    torch.manual_seed(0)
    model = VisionTransformer(config, mean=MEAN, std=STD)
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    model.init_weights()
    assert not any(tensor.isnan().any() for tensor in model.state_dict().values())
    pool = model.attn_pool
    for weight in (pool.q.weight, *pool.kv.weight.split(768), pool.proj.weight):
        check_xavier(weight, 768 + 768)
    check_xavier(pool.mlp.fc1.weight, 768 + 3072)
    assert 0.95 * math.sqrt(6 / 769) < pool.latent.abs().max().item() <= math.sqrt(6 / 769)
    assert pool.mlp.fc1.bias.std().item() == pytest.approx(1e-6, rel=0.2)
    assert not any(layer.bias.any() for layer in (pool.q, pool.kv, pool.proj, pool.norm))


def check_xavier(weight: Tensor, fans: int) -> None:
    bound = math.sqrt(6 / fans)
    assert 0.99 * bound < weight.abs().max().item() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_first_logits_are_the_head_bias() -> None:
    model = small(head_bias=-3.0)
    assert model(torch.randn(2, 3, 12, 12)).tolist() == [[-3.0] * 7] * 2


def test_meta_device_holds_no_memory() -> None:
    with torch.device("meta"):
        model = build_vit(ModelConfig(name="G/14"), mean=MEAN, std=STD)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["ViT-H/14", "H/14"])
def test_names(name: str) -> None:
    assert parameter_count(ModelConfig(name=name)) == 632_045_800
    assert model_title(ModelConfig(name=name)) == "H/14"


def test_overrides() -> None:
    shape = small(width=24, depth=2, heads=4).shape
    assert (shape.width, shape.depth, shape.heads, shape.mlp_dim) == (24, 2, 4, 96)
    assert small(mlp_dim=50).shape.mlp_dim == 50
    with torch.device("meta"):
        assert build_vit(ModelConfig(name="g/14", width=704), mean=MEAN, std=STD).shape.mlp_dim == 3072


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "X/16"}, r"model.name 'X/16' is not a size .* sizes: Ti, S, B, L, H, g, G"),
        ({"name": "B16"}, "model.name 'B16' is not a size and a patch size"),
        ({"name": "B/0"}, "model.name 'B/0' is not a size and a patch size"),
        ({"name": "b/16"}, "model.name 'b/16' is not a size and a patch size"),
        ({"name": "B/15"}, "model.image_size 224 is not a multiple of the patch size 15 in model.name"),
        ({"heads": 7}, "model.heads 7 does not divide model.width 768"),
        ({"width": 100}, "model.heads 12 does not divide model.width 100"),
    ],
)
def test_bad_configurations_name_the_key(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parameter_count(ModelConfig(**changes))


def test_the_title_of_a_model_names_what_differs_from_its_size():
    assert model_title(ModelConfig(name="H/14")) == "H/14"
    assert model_title(ModelConfig(name="Ti/4", width=64, depth=4)) == "Ti/4, width 64, depth 4"
