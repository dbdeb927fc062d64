"""Any bytes for a recipe or `--set` give a configuration or one sentence, in bounded time and memory."""

from pathlib import Path

import pytest
from hypothesis import given

from fastvit_engine.config import RECIPES, load_config
from tests.fastvit_engine.fuzzing import fuzz, mutated, read_or_refuse

pytestmark = pytest.mark.timeout(3600)

RECIPE = b"""base: quickstart
name: x
model: &m {name: Ti/4, image_size: 8}
data:
  train:
    - {shards: a.tar, weight: 2}
  mean: [0.5, 0.5, 0.5]
train: {duration: 5 epochs, global_batch_size: 8}
augment: {mixup: &p 0.5, cutmix: *p}
"""
WORDS = [b"*m", b"*p", b"&p ", b"<<: *m", b"- ", b"? ", b"!!int x", b"!!timestamp x", b"2024-13-45", b"0b_", b".inf"]
WORDS += [b".nan", b"{", b"|\n", b"\t", b"%YAML 9.9\n", b"null", b"1e999", b"9" * 5000, b"base: x\n"]
SET = [b"train.duration=5 epochs", b"data.mean=[0.5, 0.5, 0.5]", b"zero={stage: 2}", b"seed=3"]


@fuzz
@given(content=mutated([RECIPE, (RECIPES / "small" / "quickstart.yaml").read_bytes()], WORDS))
def test_recipes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    resolved = read_or_refuse(lambda: load_config(str(path)))
    if resolved is not None:
        assert read_or_refuse(lambda: resolved.to_yaml(with_origins=True))


@fuzz
@given(content=mutated(SET, WORDS))
def test_overrides(content: bytes) -> None:
    text = content.decode("utf-8", "surrogateescape")[:4000]
    read_or_refuse(lambda: load_config("quickstart", [text]))
