import pytest

from fastvit_engine.observe.units import (
    counted,
    format_bytes,
    format_count,
    format_duration,
    format_flops,
    format_share,
)


def test_counted() -> None:
    assert [counted(n, "shard") for n in (0, 1, 1438)] == ["0 shards", "1 shard", "1,438 shards"]
    assert [counted(n, "class", "classes") for n in (1, 2)] == ["1 class", "2 classes"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.42, "0.4 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (72, "1 min 12 s"),
        (3599.7, "1 h 0 min"),
        (11_100, "3 h 5 min"),
        (86_400 * 2 + 3600 * 4 + 59, "2 d 4 h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (950, "950"),
        (9_999, "9,999"),
        (45_000, "45 k"),
        (412_000, "0.4 M"),
        (86_567_656, "86.6 M"),
        (632_045_800, "632 M"),
        (1.84e9, "1.8 B"),
    ],
)
def test_count(count: float, text: str) -> None:
    assert format_count(count) == text


def test_flops_bytes_share() -> None:
    assert format_flops(334.6e9) == "334.6 GFLOP"
    assert format_flops(989e12) == "989 TFLOP"
    assert format_bytes(300 * 2**20) == "300.0 MiB"
    assert format_bytes(140 * 2**30) == "140.0 GiB"
    assert format_share(0.9722) == "97.2 %"
