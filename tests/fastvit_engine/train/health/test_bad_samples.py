import json

import numpy as np
import pytest
import torch

from fastvit_engine.data.stream.batch import BadSample, Batch
from fastvit_engine.errors import UserError
from fastvit_engine.train.health.bad_samples import BadSamples


class OneProcess:
    """A world of one process without torch.distributed."""

    def sum(self, values):
        return torch.tensor(values, dtype=torch.float64)

    def gather(self, value):
        return [value]

    def on_main(self, function):
        return function()


class Messages:
    def __init__(self):
        self.lines = []

    def message(self, text):
        self.lines.append(text)


def batch(good, bad, first=0, padding=0):
    keys = [f"good{n}" for n in range(good)] + [f"bad{first + n}" for n in range(bad)] + [""] * padding
    weights = torch.tensor([1.0] * good + [0.0] * (bad + padding))
    found = tuple(BadSample(f"bad{first + n}", "a.tar", "has no image") for n in range(bad))
    images, labels = torch.zeros(len(keys), 1, 1, 3, dtype=torch.uint8), torch.zeros(len(keys))
    return Batch(images, labels, weights, keys, np.arange(len(keys)), found)


def watch(samples, *batches):
    assert list(samples.watch(batches)) == list(batches)


def test_counts_go_on_and_each_sample_is_named_once(tmp_path):
    path, messages = tmp_path / "bad.jsonl", Messages()
    samples = BadSamples(path, 0.1, seen=1000, bad=5)
    watch(samples, batch(90, 2), batch(8, 0, padding=50), batch(0, 2))
    assert samples.settle(OneProcess(), messages) == 9 and samples.seen == 1102
    assert samples.settle(OneProcess(), messages) == 9
    resumed = BadSamples(path, 0.1, seen=samples.seen, bad=samples.bad)
    watch(resumed, batch(90, 3))
    assert resumed.settle(OneProcess(), messages) == 12
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["bad0", "bad1", "bad2"]
    assert messages.lines == [f"left out: sample 'bad{n}' of shard a.tar has no image" for n in range(3)]


def test_the_terminal_shows_the_first_twenty(tmp_path):
    messages = Messages()
    samples = BadSamples(tmp_path / "bad.jsonl", 1.0)
    for first in (0, 15, 30):
        watch(samples, batch(5, 15, first=first))
        samples.settle(OneProcess(), messages)
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 45
    assert len(messages.lines) == 22 and messages.lines[-1].startswith("left out: more samples, all named in")


@pytest.mark.parametrize(
    ("max_share", "bad", "stops"), [(0.1, 9, False), (0.1, 10, True), (0.2, 10, False), (0, 9, False)]
)
def test_more_than_the_allowed_share_stops_the_run(tmp_path, max_share, bad, stops):
    samples = BadSamples(tmp_path / "bad.jsonl", max_share)
    watch(samples, batch(60, bad))
    if not stops:
        assert samples.settle(OneProcess(), None) == bad
        return
    with pytest.raises(
        UserError, match=r"10 of 70 samples have no usable image.*max_bad_share = 0\.1 .*sample 'bad9' of"
    ):
        samples.settle(OneProcess(), None)


def test_nothing_but_bad_samples_stops_the_run_at_once(tmp_path):
    samples = BadSamples(tmp_path / "bad.jsonl", 1.0)
    watch(samples, batch(0, 60), batch(1, 60))
    with pytest.raises(UserError, match="the last 100 samples have no usable image; one of them, sample 'bad59'"):
        watch(samples, batch(0, 20, padding=3), batch(0, 60))
