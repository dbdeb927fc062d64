"""Every position embedding against the definition written out in numpy, and what models with it can do."""

import math

import numpy as np
import pytest
import torch
from scipy.special import erf

from fastvit_engine.config import Config, ModelConfig
from fastvit_engine.config.checks import check_config
from fastvit_engine.config.model_shape import resolve_shape
from fastvit_engine.errors import UserError
from fastvit_engine.models import build_for_training, build_vit, parameter_count
from fastvit_engine.models.positions import resampled, sincos_positions
from fastvit_engine.models.weights.pretrained import Pretrained, parameter_shapes
from fastvit_kernels import dispatch
from tests.in_full import in_full

HALVES = (0.5, 0.5, 0.5)
SMALL = {"name": "Ti/4", "image_size": 12, "num_classes": 5, "width": 24, "depth": 3, "heads": 3, "mlp_dim": 20}
KINDS = [
    {"pos_embed": "none"},
    {"pos_embed": "learned"},
    {"pos_embed": "learned", "pos_embed_at": "every_layer"},
    {"pos_embed": "learned", "pos_embed_at": "shared"},
    {"pos_embed": "learned_2d"},
    {"pos_embed": "learned_2d", "pos_embed_at": "every_layer"},
    {"pos_embed": "learned_2d", "pos_embed_at": "shared"},
    {"pos_embed": "relative"},
    {"pos_embed": "sincos_2d"},
]
# Of SMALL: 9 patches and the class token, which have no row in tables of columns and rows; 3 layers; heads of width 8.
ADDED = [0, 10 * 24, 3 * 10 * 24, 10 * 24, 2 * 3 * 12, 3 * 2 * 3 * 12, 2 * 3 * 12, 3 * 19 * 8, 0]
TABLES = {
    "none": set(),
    "relative": {f"blocks.{index}.attn.rel_pos_embed" for index in range(3)},
    "learned_2d": {"pos_embed_x", "pos_embed_y"},
}


def small(**changes):
    return ModelConfig.model_validate(SMALL | changes)


def randomised(config):
    torch.manual_seed(0)
    model = build_vit(config, mean=HALVES, std=HALVES)
    for name, parameter in model.named_parameters():
        if name != "pos_embed" or parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def label(changes):
    return " ".join(str(value) for value in changes.values()) or "default"


# ---- the definition


def layer_norm(x, weight, bias):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6) * weight + bias


def patches_of(images, patch):
    batch, _, height, width = images.shape
    grid = images.reshape(batch, 3, height // patch, patch, width // patch, patch)
    return grid.transpose(0, 2, 4, 1, 3, 5).reshape(batch, (height // patch) * (width // patch), -1)


def added_to_tokens(w, config, layer, prefix):
    """What is added to the input of a layer, or 0, token by token: [prefix + N, D]."""
    side = config.image_size // 4
    if config.pos_embed in ("none", "relative") or (layer > 0 and config.pos_embed_at == "input"):
        return 0
    table = layer if config.pos_embed_at == "every_layer" else 0
    added = np.zeros((prefix + side * side, SMALL["width"]))
    if config.pos_embed == "learned_2d":
        for row in range(side):
            for column in range(side):
                both = w["pos_embed_x"][table, column], w["pos_embed_y"][table, row]
                added[prefix + row * side + column] = np.concatenate(both)
        return added
    rows = w["pos_embed"][table]
    added[len(added) - side * side :] = rows[len(rows) - side * side :]
    if len(rows) > side * side:
        added[0] = rows[0]
    return added


def attended(x, w, block, heads):
    """Attention of one image [N, D], head by head, with (q . k + q . r) / sqrt(d)."""
    tokens, width = x.shape
    q, k, v = np.split(x @ w[f"{block}.attn.qkv.weight"].T + w[f"{block}.attn.qkv.bias"], 3, axis=-1)
    size, relative, out = width // heads, w.get(f"{block}.attn.rel_pos_embed"), np.zeros_like(x)
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        scores = q[:, own] @ k[:, own].T
        if relative is not None:
            for query in range(tokens):
                for key in range(tokens):
                    scores[query, key] += q[query, own] @ relative[query - key + tokens - 1]
        exponents = np.exp(scores / np.sqrt(size))
        out[:, own] = exponents / exponents.sum(axis=1, keepdims=True) @ v[:, own]
    return out @ w[f"{block}.attn.proj.weight"].T + w[f"{block}.attn.proj.bias"]


def encoded(model, images):
    """The normalised tokens of the last block, in float64."""
    config, w = model.config, {name: t.numpy().astype(np.float64) for name, t in model.state_dict().items()}
    filters = w["patch_embed.proj.weight"]
    x = patches_of(images.numpy().astype(np.float64), 4) @ filters.reshape(len(filters), -1).T
    x = x + w["patch_embed.proj.bias"]
    first = [np.broadcast_to(w[name], (len(x), *w[name].shape[1:])) for name in ("cls_token", "reg_token") if name in w]
    prefix = sum(tokens.shape[1] for tokens in first)
    x = np.concatenate([*first, x], axis=1)
    for layer in range(config.depth):
        block = f"blocks.{layer}"
        x = x + added_to_tokens(w, config, layer, prefix)
        normed = layer_norm(x, w[f"{block}.norm1.weight"], w[f"{block}.norm1.bias"])
        x = x + np.stack([attended(image, w, block, config.heads) for image in normed])
        normed = layer_norm(x, w[f"{block}.norm2.weight"], w[f"{block}.norm2.bias"])
        hidden = normed @ w[f"{block}.mlp.fc1.weight"].T + w[f"{block}.mlp.fc1.bias"]
        hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
        x = x + hidden @ w[f"{block}.mlp.fc2.weight"].T + w[f"{block}.mlp.fc2.bias"]
    return layer_norm(x, w["norm.weight"], w["norm.bias"])


OTHERS = [{}, {"registers": 2}, {"pool": "gap"}, {"pool": "gap", "registers": 1, "depth": 1}]


@pytest.mark.parametrize("others", OTHERS, ids=label)
@pytest.mark.parametrize("kind", KINDS, ids=label)
def test_equals_numpy_from_its_own_parameters(kind, others):
    model, images = randomised(small(**kind, **others)), torch.randn(2, 3, 12, 12)
    expected = encoded(model, images)
    with torch.no_grad():
        tokens, logits = model.forward_features(images), model(images)
    assert np.abs(expected).max() > 0.5
    assert np.abs(tokens.numpy() - expected).max() < 1e-5
    pooled = expected[:, 0] if model.config.pool == "cls" else expected[:, model.shape.prefix :].mean(axis=1)
    head = {name: t.numpy().astype(np.float64) for name, t in model.head.state_dict().items()}
    assert np.abs(logits.numpy() - (pooled @ head["weight"].T + head["bias"])).max() < 1e-5


@pytest.mark.parametrize(("kind", "added"), [*zip(KINDS, ADDED, strict=True)], ids=str)
def test_parameters_are_the_tables(kind, added):
    config = small(**kind)
    without = parameter_count(small(pos_embed="none"))
    assert parameter_count(config) == without + added
    state = randomised(config).state_dict()
    tables = {name for name in state if "pos_embed" in name}
    assert tables == TABLES.get(config.pos_embed, {"pos_embed"})
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == parameter_shapes(config)


def test_parameters_of_the_paper():
    """Dosovitskiy et al. 2021, Table 8, is of B/16: 197 tokens, 12 layers, heads of width 64."""
    without = parameter_count(ModelConfig(name="B/16", pos_embed="none"))
    counts = [parameter_count(ModelConfig.model_validate({"name": "B/16", **kind})) - without for kind in KINDS]
    of_columns_and_rows = 2 * 14 * 384
    expected = [197 * 768, 12 * 197 * 768, 197 * 768, of_columns_and_rows, 12 * of_columns_and_rows]
    assert counts == [0, *expected, of_columns_and_rows, 12 * (2 * 197 - 1) * 64, 0]


# ---- what follows from it


@pytest.mark.parametrize("kind", KINDS, ids=label)
def test_only_without_positions_do_permuted_patches_give_permuted_tokens(kind):
    model, images = randomised(small(**kind, registers=1)), torch.randn(2, 3, 12, 12)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    pieces = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)  # [B, 3, N, 4, 4]
    permuted = pieces[:, :, order].unflatten(2, (3, 3)).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 12, 12)
    with torch.no_grad():
        tokens, of_permuted = model.forward_features(images), model.forward_features(permuted)
    tokens = torch.cat([tokens[:, :2], tokens[:, 2:][:, order]], dim=1)
    difference = (of_permuted - tokens).abs().max()
    assert difference < 1e-5 if kind["pos_embed"] == "none" else difference > 1e-2


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind["pos_embed"] != "sincos_2d"], ids=label)
def test_every_row_of_every_table_learns(kind):
    model = randomised(small(**kind))
    model.train()(torch.randn(4, 3, 12, 12)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if "pos_embed" in name and kind["pos_embed"] != "relative":
            assert (parameter.grad.abs().sum(dim=-1) > 0).all(), name
    if kind["pos_embed"] == "relative":
        first, second, last = (model.get_parameter(f"blocks.{i}.attn.rel_pos_embed").grad for i in range(3))
        assert (first.abs().sum(dim=1) > 0).all() and (second.abs().sum(dim=1) > 0).all()
        assert (last[:10].abs().sum(dim=1) > 0).all()
        assert not last[10:].any()  # the last block has the class token's query alone, which has no token before it


@pytest.mark.parametrize(
    "kind",
    [in_full(KINDS[0]), in_full(KINDS[1]), KINDS[2], in_full(KINDS[3]), in_full(KINDS[4]), KINDS[6], KINDS[7]],
    ids=label,
)
def test_kernels_give_what_plain_pytorch_gives(kind):
    if not dispatch.INTERPRETED:
        pytest.skip("does not apply: kernels need a GPU or Triton's interpreter")
    model, images = randomised(small(**kind, depth=2)), torch.randn(1, 3, 12, 12)

    def outcome():
        logits = model(images)
        return [logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))]

    expected = outcome()
    with dispatch.using("triton"):
        found = outcome()
    for result, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("kind", KINDS, ids=label)
def test_initial_tables(kind):
    torch.manual_seed(0)
    model = build_vit(ModelConfig.model_validate({"name": "Ti/4", "image_size": 32, **kind}), mean=HALVES, std=HALVES)
    for name, table in model.named_parameters():
        if "pos_embed" in name and kind["pos_embed"] != "sincos_2d":
            assert table.std().item() == pytest.approx(0.02, rel=0.06) and table.mean().abs().item() < 2e-3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pos_embed": "relative", "pos_embed_at": "every_layer"}, "model.pos_embed is relative: set"),
        ({"pos_embed": "none", "pos_embed_at": "shared"}, "model.pos_embed is none: set"),
        ({"pos_embed": "sincos_2d", "pos_embed_at": "every_layer"}, "model.pos_embed is sincos_2d: set"),
        ({"pos_embed": "learned_2d", "width": 9, "heads": 3}, "learned_2d needs an even model.width"),
    ],
    ids=str,
)
def test_what_is_no_position_embedding_is_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        resolve_shape(small(**changes))


# ---- other image sizes


def pretrained(model):
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return Pretrained(
        "here",
        model.config,
        shapes,
        lambda names: {n: state[n].clone() for n in names},
        {"mean": HALVES, "std": HALVES},
    )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("at", ["input", "every_layer", "shared"])
def test_tables_of_columns_and_rows_are_resampled_as_the_whole_table(at, interpolation):
    two = randomised(small(pos_embed="learned_2d", pos_embed_at=at))
    whole = randomised(small(pos_embed="learned", pos_embed_at=at, pool="gap"))
    whole.pos_embed.data = two._tables(torch.zeros(1, 3, 12, 12)).detach()
    larger = [pretrained(model).changed(image_size=20, interpolation=interpolation).build() for model in (two, whole)]
    tables = [model._tables(torch.zeros(1, 3, 20, 20)) for model in larger]
    assert tables[0].shape == (3 if at == "every_layer" else 1, 25, 24)
    torch.testing.assert_close(*tables, rtol=1e-5, atol=1e-6)


def test_every_layers_table_is_resampled_and_keeps_the_class_tokens_row():
    model = randomised(small(pos_embed_at="every_layer"))
    table = pretrained(model).changed(image_size=20).read("pos_embed")
    assert table.shape == (3, 26, 24) and torch.equal(table[:, 0], model.pos_embed[:, 0])
    for layer in range(3):  # corners are aligned, and the middle of 3 is that of 5
        corners = table[layer, 1:].unflatten(0, (5, 5))[::2, ::2].flatten(0, 1)
        torch.testing.assert_close(corners, model.pos_embed[layer, 1:], rtol=1e-5, atol=1e-6)


def test_without_positions_any_size_takes_the_same_weights():
    model = randomised(small(pos_embed="none"))
    larger = pretrained(model).changed(image_size=20).build()
    images = torch.randn(2, 3, 20, 20)
    assert larger.state_dict().keys() == model.state_dict().keys()
    assert larger(images).shape == (2, 5)


def test_relative_positions_are_of_one_size():
    source = pretrained(randomised(small(pos_embed="relative")))
    with pytest.raises(UserError, match=r"'blocks.0.attn.rel_pos_embed' and its like.*cannot be resampled"):
        source.changed(image_size=20)
    assert source.changed(image_size=12, num_classes=2).build().blocks[0].attn.rel_pos_embed.shape == (19, 8)


# ---- pretraining


def training(objective, kind, **sections):
    model = {**SMALL, "num_classes": 0, **kind}
    return Config.model_validate({"model": model, "train": {"objective": objective}, **sections})


@pytest.mark.parametrize("others", [{}, {"registers": 2}, {"pool": "gap"}], ids=label)
@pytest.mark.parametrize("kind", KINDS[:7], ids=label)
def test_positions_follow_the_patches_that_an_autoencoder_sees(kind, others):
    """The tokens of some patches, with all others hidden, are those of an image of these patches and their rows."""
    mae = {"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 1}
    model = build_for_training(training("mae", kind | others, mae=mae))
    for name, parameter in model.named_parameters():
        if not name.startswith("decoder."):
            torch.nn.init.normal_(parameter, std=0.4)
    images, visible = torch.randn(2, 3, 12, 12), torch.tensor([[7, 2, 4, 8], [0, 5, 1, 3]])
    with torch.no_grad():
        tokens = model._encode(images, visible)
        tables, whole = model._tables(images), model.patch_embed(images)
        for image, kept in enumerate(visible):
            x, prefix = whole[image, kept], model.shape.prefix
            first = [token[0] for token in (model.cls_token, model.reg_token) if token is not None]
            x = torch.cat([*first, x])
            for layer, block in enumerate(model.blocks):
                if tables is not None and (layer == 0 or model.config.pos_embed_at != "input"):
                    table = tables[layer if len(tables) > 1 else 0]
                    x[prefix:] += table[len(table) - 9 + kept]
                    if len(table) == 10:
                        x[0] += table[0]
                x = block(x[None])[0]
            torch.testing.assert_close(tokens[image], model.norm(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=label)
def test_masked_patch_prediction_has_the_same_positions(kind):
    model = build_for_training(training("masked_patch", kind)).eval()
    for name, parameter in model.named_parameters():
        if name != "pos_embed" or parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.4)
    images, nothing = torch.randn(2, 3, 12, 12), torch.zeros(2, 9, dtype=torch.int8)
    own, chosen = torch.arange(9).expand(2, 9), torch.tensor([[0, 8], [3, 4]])
    with torch.no_grad():
        found = model(images, nothing, own, chosen)
        tokens = model.forward_features(images)[:, 1:]
        expected = model.decoder(torch.stack([image[rows] for image, rows in zip(tokens, chosen, strict=True)]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS[:7], ids=label)
def test_smaller_views_have_resampled_tables_in_every_layer(kind):
    dino = {"local_views": 1, "local_size": 8, "projection_width": 8, "bottleneck": 8, "prototypes": 4}
    model = build_for_training(training("dino", kind, dino=dino, ema={"decay": 0.9})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    views = torch.randn(2, 3, 8, 8)
    smaller = pretrained(model)
    kept = {name: shape for name, shape in smaller.shapes.items() if "projection" not in name and "centre" not in name}
    smaller = Pretrained(smaller.where, smaller.config, kept, smaller.load, smaller.pixels)
    with torch.no_grad():
        expected = smaller.changed(image_size=8, interpolation="bicubic").build().represent(views)
        torch.testing.assert_close(model.represent(views), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [*KINDS[:7], KINDS[8]], ids=label)
def test_smaller_images_at_first_have_resampled_tables_in_every_layer(kind):
    """Those of the model of that size; a size that the run does not have is refused as before."""
    tokens = {"image_sizes": [[8, "50%"]]}
    model = build_for_training(training("classify", kind | {"num_classes": 5}, tokens=tokens)).eval()
    for name, parameter in model.named_parameters():
        if name != "pos_embed" or parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.4)
    images = torch.randn(2, 3, 8, 8)
    smaller = pretrained(model).changed(image_size=8, interpolation="bicubic").build()
    if kind["pos_embed"] == "sincos_2d":  # one of its own size counts its own patches
        smaller.pos_embed.data.copy_(resampled(model.pos_embed, model.shape, 2))
    with torch.no_grad():
        torch.testing.assert_close(model(images), smaller(images), rtol=1e-4, atol=1e-4)
        if kind["pos_embed"] != "none":
            with pytest.raises(ValueError, match="pos_embed"):
                model(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("kind", KINDS[1:7], ids=label)
def test_tables_are_resampled_as_pytorch_does_it_with_its_gradients(kind):
    config, side = small(**kind), 2
    shape = resolve_shape(config)
    own, layers = shape.positions - shape.patches, 2
    table = torch.randn(layers, shape.positions, 24, dtype=torch.float32, requires_grad=True)
    grid = table[:, own:].unflatten(1, (3, 3)).movedim(3, 1)
    grid = torch.nn.functional.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    expected = torch.cat([table[:, :own], grid.movedim(1, 3).flatten(1, 2)], dim=1)
    found = resampled(table, shape, side)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((of * weights).sum(), table)[0] for of in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert resampled(table, shape, 3) is table


def test_objectives_that_relative_positions_do_not_go_with():
    data, relative = {"train": "x"}, {"pos_embed": "relative"}
    with pytest.raises(UserError, match="model.pos_embed = relative .* train.objective = mae leaves patches out"):
        check_config(training("mae", relative, data=data))
    views, average = {"local_views": 2, "local_size": 8}, {"decay": 0.9}
    augment = {"randaugment_ops": 0}
    with pytest.raises(UserError, match=r"relative is for images of one size, and dino.local_size is 8 where .* 12"):
        check_config(training("dino", relative, data=data, dino=views, ema=average, augment=augment))
    for same in ({"local_views": 0}, {"local_views": 2, "local_size": 12}):
        check_config(training("dino", relative, data=data, dino=same, ema=average, augment=augment))
    check_config(training("masked_patch", relative, data=data))


# ---- fixed tables


def fixed(**changes):
    return ModelConfig.model_validate(
        {"name": "Ti/8", "image_size": 32, "width": 24, "heads": 3, "depth": 2, "pos_embed": "sincos_2d"} | changes
    )


def test_each_patch_has_the_sines_and_cosines_of_its_column_and_row():
    table = sincos_positions(resolve_shape(fixed(pool="gap")))
    assert table.shape == (1, 16, 24) and table.dtype == torch.float32
    frequencies = [10_000 ** (-i / 5) for i in range(6)]
    for patch in range(16):
        y, x = divmod(patch, 4)
        expected = [f(axis * w) for axis in (x, y) for f in (math.sin, math.cos) for w in frequencies]
        assert table[0, patch].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("changes", "rows"), [({}, 1), ({"registers": 2}, 0), ({"pool": "gap"}, 0)])
def test_a_class_token_has_no_position(changes, rows):
    table = sincos_positions(resolve_shape(fixed(**changes)))
    assert table.shape[1] == 16 + rows and not table[:, :rows].any() and table[:, rows:].any(dim=2).all()


def test_the_table_is_no_parameter_that_learns():
    config, learned = fixed(), fixed(pos_embed="learned")
    model = build_vit(config, mean=HALVES, std=HALVES)
    assert parameter_count(learned) - parameter_count(config) == 17 * 24
    before = model.pos_embed.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    torch.nn.init.normal_(model.head.weight)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert torch.equal(model.pos_embed, before) and model.pos_embed.grad is None
    assert "pos_embed" in model.state_dict()  # other programs read it as a learned one


def test_another_image_size_has_the_table_of_its_own_grid():
    small, large = fixed(), fixed(image_size=64)
    model = build_vit(small, mean=HALVES, std=HALVES)
    state = model.state_dict()
    source = Pretrained(
        "here", small, {name: tuple(t.shape) for name, t in state.items()}, lambda names: {n: state[n] for n in names}
    )
    table = source.changed(image_size=64).read("pos_embed")
    assert torch.equal(table, sincos_positions(resolve_shape(large)))
    assert not source.changed(image_size=64, num_classes=3).build().pos_embed.requires_grad


@pytest.mark.parametrize("width", [42, 4])
def test_a_width_without_quarters_is_refused(width):
    with pytest.raises(UserError, match=f"multiple of 4 from 8 on, not {width}"):
        resolve_shape(fixed(width=width, heads=1))
