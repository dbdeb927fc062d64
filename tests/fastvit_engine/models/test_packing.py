"""Images of different sizes in one sequence: each must get what it gets by itself."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastvit_engine.config import ModelConfig
from fastvit_engine.errors import UserError
from fastvit_engine.models import VisionTransformer, build_vit
from fastvit_engine.models.positions import joined
from fastvit_engine.models.weights.position import resample_axis, resample_positions
from fastvit_engine.packed_image import packed_bytes, read_grids, read_packed, write_packed

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
PATCH, MOST = 4, 9
GRIDS = ((3, 3), (1, 5), (4, 2), (1, 1), (9, 1), (3, 3))
SMALL = ModelConfig(name="Ti/4", image_size=12, num_classes=7, width=16, depth=3, heads=2)
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
POSITIONS = [
    {"pos_embed": "learned"},
    {"pos_embed": "learned_2d"},
    {"pos_embed": "sincos_2d"},
    {"pos_embed": "none"},
    {"pos_embed": "learned", "pos_embed_at": "every_layer"},
    {"pos_embed": "learned_2d", "pos_embed_at": "shared"},
]
KINDS = [{"pool": "cls"}, {"pool": "gap"}, {"registers": 2}, {"pool": "gap", "registers": 1, "head": "mlp"}]


def model_of(**changes: Any) -> VisionTransformer:
    """With random weights, but for positions that are no parameters."""
    torch.manual_seed(0)
    model = build_vit(SMALL.model_copy(update=changes), mean=MEAN, std=STD)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.4)
    return model


def images_of(*grids: tuple[int, int]) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (rows * PATCH, columns * PATCH, 3), dtype=np.uint8) for rows, columns in grids]


def packed(images: list[np.ndarray]) -> Tensor:
    rows = np.full((len(images), packed_bytes(MOST, PATCH)), 77, np.uint8)  # what is behind the patches is not read
    for row, image in zip(rows, images, strict=True):
        write_packed(image, PATCH, row)
    return torch.from_numpy(rows)


def alone(model: VisionTransformer, image: np.ndarray) -> Tensor:
    """Logits [1, C] by the plain layers of a model for images of this size: its tables are resampled for it."""
    rows, columns = (side // PATCH for side in image.shape[:2])
    config, shape = model.config, model.shape
    tables = None
    if config.pos_embed == "learned_2d":
        assert model.pos_embed_x is not None and model.pos_embed_y is not None
        tables = joined(resample_axis(model.pos_embed_x, columns), resample_axis(model.pos_embed_y, rows))
    elif config.pos_embed == "sincos_2d":
        tables = build_vit(config.model_copy(update={"image_size": 9 * PATCH}), mean=MEAN, std=STD).pos_embed
        assert tables is not None
        own = tables.shape[1] - 81
        grid = tables[:, own:].unflatten(1, (9, 9))[:, :rows, :columns].flatten(1, 2)
        tables = torch.cat([tables[:, :own], grid], dim=1)
    elif config.pos_embed == "learned":
        assert model.pos_embed is not None
        own = shape.positions - shape.patches
        grid = model.pos_embed[:, own:].unflatten(1, (3, 3)).movedim(3, 1)
        grid = torch.nn.functional.interpolate(grid, (rows, columns), mode="bilinear", align_corners=True)
        tables = torch.cat([model.pos_embed[:, :own], grid.movedim(1, 3).flatten(1, 2)], dim=1)
        if rows == columns:
            torch.testing.assert_close(tables, resample_positions(model.pos_embed, rows, class_tokens=own))
    model.__dict__["_tables"] = lambda images: tables  # what else a model has depends on no size
    try:
        return model(torch.from_numpy(image)[None])
    finally:
        del model.__dict__["_tables"]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("positions", POSITIONS, ids=lambda keys: "-".join(map(str, keys.values())))
def test_each_image_as_alone_with_gradients(positions: dict[str, str], kind: dict[str, Any]) -> None:
    model = model_of(**positions, **kind)
    images = images_of(*GRIDS)
    outputs = model(packed(images))
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1))
    (outputs * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    expected = torch.cat([alone(model, image) for image in images])
    (expected * weights).sum().backward()

    torch.testing.assert_close(outputs, expected, **TOLERANCE)
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert gradients.keys() == learned
    for name, parameter in model.named_parameters():
        if name in learned:
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(gradients[name] / scale, parameter.grad / scale, msg=name, **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_squares_as_a_batch_of_squares(kind: dict[str, Any]) -> None:
    model, images = model_of(**kind), images_of((3, 3), (3, 3), (3, 3))
    torch.testing.assert_close(model(packed(images)), model(torch.from_numpy(np.stack(images))), **TOLERANCE)


def test_a_hook_sees_all_tokens_and_the_result_is_the_same() -> None:
    model, images = model_of(), packed(images_of(*GRIDS))
    expected, seen = model(images), []
    model.norm.register_forward_hook(lambda _, inputs, outputs: seen.append(outputs.shape))
    torch.testing.assert_close(model(images), expected, **TOLERANCE)
    assert seen == [(1, sum(rows * columns + 1 for rows, columns in GRIDS), 16)]


def test_interpreted_kernels_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for kernels in ("reference", "triton"):
        monkeypatch.setenv("FASTVIT_KERNELS", kernels)
        model = model_of(pos_embed="learned_2d", layer_scale=0.5)
        outputs = model(packed(images_of(*GRIDS)))
        outputs.square().sum().backward()
        results.append((outputs, {name: parameter.grad for name, parameter in model.named_parameters()}))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-4)
    for name, gradient in results[0][1].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(results[1][1][name] / scale, gradient / scale, rtol=1e-4, atol=1e-4, msg=name)


def test_grids_may_be_given_and_padding_is_one_black_patch() -> None:
    model, images = model_of(), packed(images_of(*GRIDS))
    assert read_grids(images).tolist() == [list(grid) for grid in GRIDS]
    torch.testing.assert_close(model(images, grids=np.array(GRIDS)), model(images), rtol=0, atol=0)
    padding = torch.zeros(1, images.shape[1], dtype=torch.uint8)
    black = packed([np.zeros((PATCH, PATCH, 3), np.uint8)])
    torch.testing.assert_close(model(padding), model(black), rtol=0, atol=0)
    assert read_packed(padding[0]).shape == (1, 1, 3)


def test_form_of_an_image() -> None:
    images = images_of(*GRIDS)
    for row, image in zip(packed(images), images, strict=True):
        assert np.array_equal(read_packed(row), image)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool": "map"}, "model.pool = map is not made for them"),
        ({"pos_embed": "relative"}, "model.pos_embed = relative counts tokens between two patches"),
    ],
)
def test_refused_models(changes: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model_of(**changes)(packed(images_of((3, 3))))


def test_checkpointed_blocks_have_the_same_gradients() -> None:
    images, results = packed(images_of(*GRIDS)), []
    for count in (0, 3):
        model = model_of()
        model.checkpoint_blocks(count)
        outputs = model(images)
        outputs.square().sum().backward()
        results.append([outputs, *(parameter.grad for parameter in model.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)
