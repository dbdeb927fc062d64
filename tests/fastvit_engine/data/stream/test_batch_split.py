"""The global batch over ranks and passes: what holds for any batch, number of ranks and limit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvit_engine.config import Config
from fastvit_engine.data.stream.batch_split import possible_splits, split_batch
from fastvit_engine.errors import UserError


def _config(batch, micro_batch=None, mixed=False):
    train = {"global_batch_size": batch, "micro_batch_size": micro_batch}
    return Config.model_validate({"train": train, "augment": {"cutmix": 1.0 if mixed else 0.0}})


@st.composite
def _cases(draw):
    batch, mixed = draw(st.integers(1, 300)), draw(st.booleans())
    world_size = draw(st.integers(1, min(batch, 40)))
    largest = draw(st.none() | st.integers(2 if mixed else 1, 70))
    return batch, world_size, largest, mixed


@given(_cases())
def test_every_image_is_in_one_micro_batch_of_one_rank(case):
    batch, world_size, largest, mixed = case
    split = split_batch(_config(batch, largest, mixed), world_size)
    positions = [split.positions(rank) for rank in range(world_size)]
    sizes = [split.micro_batches(rank) for rank in range(world_size)]
    assert sorted(np.concatenate(positions)) == list(range(batch))
    assert [len(own) for own in positions] == [sum(own) for own in sizes]
    assert all((np.diff(own) > 0).all() for own in positions)
    assert {len(own) for own in sizes} == {split.accumulation_steps}  # every rank makes as many passes
    assert max(map(max, sizes)) == split.micro_batch_size <= (largest or batch)
    shares = [sum(own) for own in sizes]
    assert (max(shares), min(shares)) == (split.largest_share, split.smallest_share)
    assert split.idle_ranks == shares.count(0) and (mixed or split.idle_ranks == 0)
    assert split.equal == (len({size for own in sizes for size in own}) == 1)


@given(_cases())
def test_shares_and_micro_batches_differ_by_one_image_or_pair(case):
    batch, world_size, largest, mixed = case
    split = split_batch(_config(batch, largest, mixed), world_size)
    unit = 2 if mixed else 1  # the last image of an odd batch counts as a pair
    units = [[-(-size // unit) for size in split.micro_batches(rank)] for rank in range(world_size)]
    assert max(map(sum, units)) - min(map(sum, units)) <= 1
    for own in units:
        assert own == sorted(own, reverse=True)
        assert own[0] - own[-1] <= 1


@given(_cases())
def test_images_that_are_mixed_stay_together_and_with_nobody_else(case):
    """`mix` takes images 2i and 2i + 1 of a micro-batch, and leaves the last one of an odd micro-batch alone."""
    batch, world_size, largest, mixed = case
    if not mixed:
        return
    split = split_batch(_config(batch, largest, mixed), world_size)
    partners = []
    for rank in range(world_size):
        ends = np.cumsum(split.micro_batches(rank))[:-1]
        for micro in np.split(split.positions(rank), ends):
            partners += [tuple(micro[i : i + 2].tolist()) for i in range(0, len(micro), 2)]
    alone = [(batch - 1,)] if batch % 2 else []
    assert sorted(partners) == [(i, i + 1) for i in range(0, batch - 1, 2)] + alone


@given(_cases())
def test_the_mean_over_passes_and_ranks_is_that_of_the_global_batch(case):
    batch, world_size, largest, mixed = case
    split = split_batch(_config(batch, largest, mixed), world_size)
    losses = np.random.default_rng(batch).random(batch)
    total = 0.0
    for rank in range(world_size):
        own = split.positions(rank)
        ends = np.cumsum(split.micro_batches(rank))[:-1]
        for micro in np.split(losses[own], ends):
            padded = micro if len(micro) else np.zeros(1)
            total += padded.mean() * split.loss_scale(len(padded))
            assert not split.equal or split.loss_scale(len(padded)) == 1
    assert total / split.accumulation_steps / world_size == pytest.approx(losses.mean(), rel=1e-12)


@given(_cases())
def test_the_size_that_was_chosen_gives_the_same_split_again(case):
    batch, world_size, largest, mixed = case
    for split in possible_splits(_config(batch, None, mixed), world_size, largest):
        assert split_batch(_config(batch, split.micro_batch_size, mixed), world_size) == split


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world_size", "expected"),
    [
        (4096, None, 8, (512, 1)),
        (4096, 128, 8, (128, 4)),
        (4096, 128, 64, (64, 1)),  # never more than the process's share
        (96, 10, 2, (8, 6)),  # an even share is cut in equal parts: the largest divisor of 48 that is at most 10
        (4096, 128, 56, (74, 1)),
        (4096, 64, 56, (37, 2)),
        (4096, 60, 56, (37, 2)),
    ],
)
def test_the_world_size_decides_the_split(global_batch, micro_batch, world_size, expected):
    split = split_batch(_config(global_batch, micro_batch), world_size)
    assert (split.micro_batch_size, split.accumulation_steps) == expected


@pytest.mark.parametrize(("batch", "world_size"), [(12, 1), (12, 2), (12, 3), (16, 8), (64, 8), (12, 4), (12, 12)])
def test_an_even_share_is_every_nth_pair_and_an_odd_one_every_nth_image(batch, world_size):
    size = 2 if batch // world_size % 2 == 0 else 1
    for rank in range(world_size):
        expected = np.arange(batch).reshape(-1, size)[rank::world_size].ravel()
        assert split_batch(_config(batch), world_size).positions(rank).tolist() == expected.tolist()


def test_33_images_on_7_ranks():
    split = split_batch(_config(33, 3), 7)
    assert [split.micro_batches(rank) for rank in range(7)] == 5 * [(3, 2)] + 2 * [(2, 2)]
    mixed = split_batch(_config(33, 3, mixed=True), 7)  # 17 pairs, the last of one image
    assert [mixed.micro_batches(rank) for rank in range(7)] == [(2, 2, 2), (2, 2, 2), (2, 2, 1)] + 4 * [(2, 2, 0)]
    assert mixed.positions(2).tolist() == [4, 5, 18, 19, 32]


def test_more_processes_than_images_are_refused():
    with pytest.raises(UserError, match="train.global_batch_size is 7, fewer images than the 8 processes: raise it"):
        split_batch(_config(7), 8)


def test_a_step_whose_images_are_compared_has_one_pass():
    def config(micro_batch):
        train = {"objective": "moco", "global_batch_size": 9, "micro_batch_size": micro_batch}
        return Config.model_validate({"train": train})

    (split,) = possible_splits(config(None), 2)
    assert (split.accumulation_steps, split.micro_batch_size) == (1, 5)
    assert split_batch(config(5), 2) == split
    with pytest.raises(UserError, match=r"micro_batch_size is 4, and each process has 5 images .* Set it to null; if"):
        split_batch(config(4), 2)


def test_a_micro_batch_without_room_for_a_pair_is_refused_if_images_are_mixed():
    with pytest.raises(UserError, match=r"micro_batch_size is 1, and .* mix images in pairs: set it to 2 or more"):
        split_batch(_config(8, 1, mixed=True), 2)
    assert split_batch(_config(8, 2, mixed=True), 2).micro_batch_size == 2
