"""Fixed position embeddings, and models that have them."""

import math

import pytest
import torch

from fastvit_engine.config import ModelConfig
from fastvit_engine.config.model_shape import resolve_shape
from fastvit_engine.errors import UserError
from fastvit_engine.models import build_vit, parameter_count
from fastvit_engine.models.positions import sincos_positions
from fastvit_engine.models.weights.pretrained import Pretrained

HALVES = (0.5, 0.5, 0.5)


def config(**changes):
    return ModelConfig.model_validate(
        {"name": "Ti/8", "image_size": 32, "width": 24, "heads": 3, "depth": 2, "pos_embed": "sincos_2d"} | changes
    )


def test_each_patch_has_the_sines_and_cosines_of_its_column_and_row():
    table = sincos_positions(resolve_shape(config(pool="gap")))
    assert table.shape == (1, 16, 24) and table.dtype == torch.float32
    frequencies = [10_000 ** (-i / 5) for i in range(6)]
    for patch in range(16):
        y, x = divmod(patch, 4)
        expected = [f(axis * w) for axis in (x, y) for f in (math.sin, math.cos) for w in frequencies]
        assert table[0, patch].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("changes", "rows"), [({}, 1), ({"registers": 2}, 0), ({"pool": "gap"}, 0)])
def test_a_class_token_has_no_position(changes, rows):
    table = sincos_positions(resolve_shape(config(**changes)))
    assert table.shape[1] == 16 + rows and not table[:, :rows].any() and table[:, rows:].any(dim=2).all()


def test_the_table_is_no_parameter_that_learns():
    fixed, learned = config(), config(pos_embed="learned")
    model = build_vit(fixed, mean=HALVES, std=HALVES)
    assert parameter_count(learned) - parameter_count(fixed) == 17 * 24
    before = model.pos_embed.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    torch.nn.init.normal_(model.head.weight)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert torch.equal(model.pos_embed, before) and model.pos_embed.grad is None
    assert "pos_embed" in model.state_dict()  # other programs read it as a learned one


def test_another_image_size_has_the_table_of_its_own_grid():
    small, large = config(), config(image_size=64)
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
        resolve_shape(config(width=width, heads=1))
