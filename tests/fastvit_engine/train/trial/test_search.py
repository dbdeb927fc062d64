import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvit_engine.train.trial.search import largest_that_fits, search

SIZES = [1, 2, 4, 8, 16, 32, 64, 128]


def tries(sizes, first, limit):
    """The micro-batches that are tried if one of more than `limit` does not fit, and the largest that does."""
    tried = search(sizes, first, lambda size: 10 * size if size <= limit else None)
    best = largest_that_fits(tried)
    return [each.micro_batch_size for each in tried], None if best is None else best.micro_batch_size


@pytest.mark.parametrize(
    ("first", "limit", "tried", "best"),
    [
        (128, 1000, [128], 128),  # the largest fits: nothing else is tried
        (32, 1000, [32, 64, 128], 128),
        (32, 40, [32, 64], 32),
        (32, 70, [32, 64, 128], 64),
        (32, 3, [32, 4, 1, 2], 2),
        (32, 0, [32, 4, 1], None),
    ],
)
def test_the_first_is_what_was_computed_and_the_others_lie_between_what_fits_and_what_does_not(
    first, limit, tried, best
):
    assert tries(SIZES, first, limit) == (tried, best)


@given(st.sets(st.integers(1, 4096), min_size=1, max_size=40), st.data())
def test_the_largest_that_fits_is_found_in_few_tries(sizes, data):
    rising = sorted(sizes)
    first, limit = data.draw(st.sampled_from(rising)), data.draw(st.integers(0, 5000))
    tried, best = tries(rising, first, limit)
    assert best == max((size for size in rising if size <= limit), default=None)
    assert len(tried) == len(set(tried)) <= len(rising).bit_length() + 1
