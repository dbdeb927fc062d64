"""Brace patterns are what `braceexpand` makes of them, unless they would fill memory."""

import time

import pytest
from braceexpand import braceexpand
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvit_engine.data.shards import braces
from fastvit_engine.data.shards.braces import expand_braces
from tests.in_full import IN_FULL


def test_patterns_of_shards() -> None:
    assert expand_braces("train-{008..011}.tar") == [f"train-{n:03d}.tar" for n in range(8, 12)]
    assert expand_braces("{a,b}/{0..1}.tar") == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]
    assert expand_braces("plain.tar") == ["plain.tar"]
    assert len(expand_braces("{000000..149999}.tar")) == 150_000


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{0..999999999999}.tar", "it names 1,000,000,000,000 files, and 1,000,000 are allowed"),
        ("{a,b}" * 200, "it names more than 1,000,000,000,000,000 files"),
        ("{x{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9},y}.tar", "it names 1,000,000,001 files"),
        ("{0.." + "9" * 5000 + "}", "the numbers of a range are too large"),
        ("{" * 3000 + "a,b" + "}" * 3000, "the braces are nested too deeply"),
        ("{a" * 50_000, "a pattern of 100,000 characters is too long"),
        ("{0..3", "Unbalanced braces"),
    ],
)
def test_what_would_fill_memory_or_does_not_match_is_refused_at_once(pattern: str, message: str) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match=message):
        expand_braces(pattern)
    assert time.process_time() - began < 5


@settings(max_examples=500 if IN_FULL else 100, deadline=None)
@given(st.text("{},.-\\019a", max_size=14))
def test_the_count_is_that_of_braceexpand(pattern: str) -> None:
    try:
        expected = list(braceexpand(pattern))
    except ValueError:
        with pytest.raises(ValueError):
            expand_braces(pattern)
        return
    assert expand_braces(pattern) == expected
    assert braces._count(pattern) >= len(expected)
