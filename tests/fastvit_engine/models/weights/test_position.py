"""Position tables for another grid, against scipy and PyTorch."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastvit_engine.errors import UserError
from fastvit_engine.models.weights.position import grid_side, resample_positions


@settings(max_examples=40, deadline=None)
@example(24, 22, 0, 1, 0)
@given(st.integers(1, 24), st.integers(1, 37), st.integers(0, 1), st.integers(1, 3), st.integers(0, 2**31))
def test_bilinear_is_scipy_zoom_of_order_1(before, after, class_tokens, layers, seed):
    table = np.random.default_rng(seed).normal(size=(layers, before**2 + class_tokens, 5))
    found = resample_positions(torch.from_numpy(table), after, class_tokens=class_tokens).numpy()
    assert found.shape == (layers, after**2 + class_tokens, 5)
    assert np.array_equal(found[:, :class_tokens], table[:, :class_tokens])  # to the bit
    for layer, resampled in zip(table[:, class_tokens:], found[:, class_tokens:], strict=True):
        grid = layer.reshape(before, before, 5)
        # "nearest": where rounding puts the last coordinate beyond the grid, as from 24 to 22, SciPy's default is 0
        zoomed = scipy.ndimage.zoom(grid, (after / before, after / before, 1), order=1, mode="nearest")
        expected = zoomed.reshape(after**2, 5)
        np.testing.assert_allclose(resampled, expected, rtol=0, atol=1e-15 * max(1, np.abs(grid).max() * 16))


@pytest.mark.parametrize(("before", "after"), [(14, 24), (16, 37), (37, 16), (24, 14), (7, 7)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_two_ways_are_those_of_the_authors_and_of_transformers(before, after, interpolation):
    table = torch.randn(1, before**2 + 1, 8, dtype=torch.float64)
    found = resample_positions(table, after, class_tokens=1, interpolation=interpolation)
    grid = table[:, 1:].reshape(1, before, before, 8).permute(0, 3, 1, 2)
    aligned = interpolation == "bilinear"
    expected = torch.nn.functional.interpolate(grid, size=(after, after), mode=interpolation, align_corners=aligned)
    assert torch.equal(found[:, :1], table[:, :1])
    torch.testing.assert_close(found[:, 1:], expected.permute(0, 2, 3, 1).flatten(1, 2), rtol=0, atol=1e-15)


def test_the_same_grid_is_the_same_table_and_float32_is_rounded_once():
    table = torch.randn(1, 17, 3)
    assert resample_positions(table, 4, class_tokens=1) is table
    found = resample_positions(table, 7, class_tokens=1)
    assert found.dtype == torch.float32
    assert torch.equal(found, resample_positions(table.double(), 7, class_tokens=1).float())


@pytest.mark.parametrize(("tokens", "class_tokens"), [(0, 0), (1, 1), (5, 0), (16, 1), (0, 1)])
def test_a_table_of_no_square_grid_is_refused(tokens, class_tokens):
    with pytest.raises(UserError, match=f"^the table has {tokens} positions, which are no square grid of patches"):
        grid_side(tokens, class_tokens, "the table")
