import numpy as np
import pytest
import torch

from fastvit_engine.models.corruption import corrupted
from fastvit_engine.objectives import corrupt_patches
from fastvit_engine.objectives.masks import draw_corruption, draw_order

CPU = torch.device("cpu")


def distinct(batch: int, patches: int) -> torch.Tensor:
    """Embeddings [B, N, 2] that say which image and which patch they are of."""
    image, patch = torch.meshgrid(torch.arange(batch), torch.arange(patches), indexing="ij")
    return torch.stack([image, patch], dim=-1).float()


def drawn(form: str, batch: int, patches: int, ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
    embeddings, mask_token = distinct(batch, patches), torch.tensor([-1.0, -2.0])
    if form == "generator":
        return corrupt_patches(embeddings, mask_token, torch.Generator().manual_seed(0), ratio)
    corruption = draw_corruption(np.arange(batch), patches, ratio, CPU)
    assert torch.equal(corruption.chosen, torch.stack([row.nonzero()[:, 0] for row in corruption.kind]))
    return corrupted(embeddings, mask_token, corruption.kind, corruption.source), corruption.kind


@pytest.mark.parametrize("form", ["generator", "seeds"])
@pytest.mark.parametrize(("patches", "ratio"), [(196, 0.5), (5, 0.5), (9, 0.15), (2, 1.0), (4, 0.0)])
def test_each_patch_is_what_its_kind_says(form, patches, ratio):
    found, kind = drawn(form, 32, patches, ratio)
    assert kind.dtype == torch.int8 and kind.shape == (32, patches)
    assert ((kind > 0).sum(dim=1) == round(ratio * patches)).all()
    before = distinct(32, patches)
    assert (found[kind == 1] == torch.tensor([-1.0, -2.0])).all()
    assert torch.equal(found[(kind == 0) | (kind == 3)], before[(kind == 0) | (kind == 3)])
    taken, own = found[kind == 2], before[kind == 2]
    assert (taken[:, 0] == own[:, 0]).all() and (taken[:, 1] != own[:, 1]).all()
    assert torch.equal(taken[:, 1], taken[:, 1].clamp(0, patches - 1))


@pytest.mark.parametrize("form", ["generator", "seeds"])
def test_the_kinds_have_their_shares_and_every_other_patch_is_taken(form):
    found, kind = drawn(form, 2000, 16, 0.5)
    chosen = kind[kind > 0]
    assert [(chosen == value).double().mean().item() for value in (1, 2, 3)] == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    assert (kind > 0).double().mean(dim=0).numpy() == pytest.approx(0.5, abs=0.05)
    distance = (found - distinct(2000, 16))[kind == 2][:, 1] % 16
    assert sorted(distance.unique().tolist()) == list(range(1, 16))


def test_a_sample_is_corrupted_the_same_in_any_batch():
    seeds = np.array([7, -3, 2**62])
    together = draw_corruption(seeds, 12, 0.5, CPU)
    alone = [draw_corruption(seeds[row : row + 1], 12, 0.5, CPU) for row in range(3)]
    assert torch.equal(together.kind, torch.cat([one.kind for one in alone]))
    assert torch.equal(together.source, torch.cat([one.source for one in alone]))
    assert not torch.equal(together.kind[0], together.kind[1])


def test_the_order_of_a_samples_patches_depends_on_its_seed_alone():
    seeds = np.array([7, -3, 2**62])
    orders = draw_order(seeds, 50)
    assert orders.dtype == np.int64
    assert (np.sort(orders, axis=1) == np.arange(50)).all()
    assert (orders[1] == draw_order(seeds[1:2], 50)[0]).all() and (orders[0] != orders[1]).any()


def test_every_patch_comes_first_equally_often():
    first = np.bincount(draw_order(np.arange(8000), 8)[:, 0], minlength=8) / 8000
    assert first == pytest.approx(1 / 8, abs=0.012)


def test_gradients_reach_the_mask_token_and_the_patches_that_are_seen():
    embeddings, mask_token = torch.randn(4, 9, 3, requires_grad=True), torch.zeros(3, requires_grad=True)
    corruption = draw_corruption(np.arange(4), 9, 0.5, CPU)
    corrupted(embeddings, mask_token, corruption.kind, corruption.source).sum().backward()
    assert (mask_token.grad == (corruption.kind == 1).sum()).all()
    seen = torch.zeros(4, 9)
    for image, (kinds, sources) in enumerate(zip(corruption.kind.tolist(), corruption.source.tolist(), strict=True)):
        for kind, source in zip(kinds, sources, strict=True):
            seen[image, source] += kind != 1
    assert torch.equal(embeddings.grad, seen[..., None].expand(-1, -1, 3))


def test_a_single_patch_is_refused():
    with pytest.raises(ValueError, match="one patch has no other"):
        corrupt_patches(torch.zeros(1, 1, 2), torch.zeros(2), torch.Generator())
