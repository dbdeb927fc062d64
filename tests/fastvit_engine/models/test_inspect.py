"""What a model has learned, against the definitions written out in NumPy."""

import numpy as np
import pytest
import torch

from fastvit_engine.models.inspect import (
    attention_rollout,
    filter_components,
    mean_attention_distance,
    patch_distances,
    pos_embed_similarity,
)


def attention_of(layers=3, images=2, heads=4, tokens=13, seed=0):
    scores = torch.randn(layers, images, heads, tokens, tokens, generator=torch.Generator().manual_seed(seed))
    return (2 * scores).softmax(dim=-1)


def test_components_are_the_eigenvectors_of_the_filters_covariance():
    weight = torch.randn(40, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    components, variances = filter_components(weight, 10)
    covariance = np.cov(weight.permute(0, 2, 3, 1).reshape(40, -1).numpy().astype(np.float64), rowvar=False)
    values, vectors = np.linalg.eigh(covariance)
    assert np.allclose(variances, values[::-1][:10], rtol=1e-9)
    assert np.allclose(np.abs(components.numpy() @ vectors[:, ::-1][:, :10]), np.eye(10), atol=1e-8)
    assert (components.max(dim=1).values == components.abs().max(dim=1).values).all()


@pytest.mark.parametrize(("width", "patch_size", "kept"), [(5, 4, 4), (64, 2, 12), (64, 4, 28)])
def test_there_are_no_more_components_than_directions(width, patch_size, kept):
    components, variances = filter_components(torch.randn(width, 3, patch_size, patch_size))
    assert components.shape == (kept, 3 * patch_size**2) and variances.shape == (kept,)


def test_one_filter_has_no_components():
    with pytest.raises(ValueError, match="no variance"):
        filter_components(torch.randn(1, 3, 2, 2))


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_similarity_is_the_cosine_of_the_patches_rows(prefix):
    table = np.random.default_rng(0).normal(size=(1, prefix + 6, 8))
    rows = table[0, prefix:]
    expected = rows @ rows.T / np.linalg.norm(rows, axis=1)[:, None] / np.linalg.norm(rows, axis=1)
    assert np.allclose(pos_embed_similarity(table, (2, 3)), expected)
    assert np.allclose(pos_embed_similarity(table[0], (2, 3)), expected)


def test_a_row_of_zeros_is_similar_to_none():
    assert not pos_embed_similarity(torch.zeros(1, 4, 8), 2).any()


@pytest.mark.parametrize("prefix", [0, 1, 4])
def test_distance_is_weighted_by_attention_between_patches(prefix):
    attention = attention_of(tokens=12 + prefix)
    expected = np.zeros((3, 4))
    places = [(row, column) for row in range(3) for column in range(4)]
    for layer, head in np.ndindex(3, 4):
        for image in range(2):
            for query, (row, column) in enumerate(places):
                weights = attention[layer, image, head, prefix + query, prefix:].double().numpy()
                pixels = np.array([14 * np.hypot(row - other[0], column - other[1]) for other in places])
                expected[layer, head] += (weights / weights.sum() * pixels).sum() / len(places) / 2
    assert np.allclose(mean_attention_distance(attention, (3, 4), 14), expected)


def test_a_head_that_looks_at_itself_looks_no_distance_and_an_even_one_the_mean():
    alone = torch.eye(9).expand(1, 1, 1, 9, 9)
    even = torch.full((1, 1, 1, 9, 9), 1 / 9)
    assert mean_attention_distance(alone, 3, 16).item() == 0
    assert mean_attention_distance(even, 3, 16).item() == pytest.approx(patch_distances(3, 16).mean().item())


@pytest.mark.parametrize(("prefix", "class_token"), [(0, None), (1, None), (3, None), (3, False), (0, False)])
def test_rollout_multiplies_the_layers(prefix, class_token):
    attention = attention_of(tokens=12 + prefix)
    product = np.broadcast_to(np.eye(12 + prefix), (2, 12 + prefix, 12 + prefix))
    for layer in attention.double().numpy():
        mixed = layer.mean(axis=1) + np.eye(12 + prefix)
        product = (mixed / mixed.sum(axis=-1, keepdims=True)) @ product
    has_class_token = prefix > 0 if class_token is None else class_token
    row = product[:, 0, prefix:] if has_class_token else product[:, prefix:, prefix:].mean(axis=1)
    assert np.allclose(attention_rollout(attention, (3, 4), class_token=class_token), row.reshape(2, 3, 4))


def test_arrays_are_taken_as_tensors_are():
    attention = attention_of(tokens=10)
    assert torch.equal(attention_rollout(attention.numpy(), 3), attention_rollout(attention, 3))
    assert torch.equal(mean_attention_distance(attention.numpy(), 3, 2), mean_attention_distance(attention, 3, 2))
