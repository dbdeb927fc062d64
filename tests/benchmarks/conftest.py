from dataclasses import replace

import pytest
import torch

from benchmarks.ops.layer_norm import LAYER_NORM
from benchmarks.registry import Case
from benchmarks.shapes import Shape
from tests.fastvit_engine.conftest import photo, write_tar

__all__ = ["photo", "write_tar"]  # fixtures

TINY = Shape("tiny/8@16", 8, 16, 32, 2, 64, 2, (2,))


@pytest.fixture
def case():
    """Layer normalisation, small, with no providers."""
    return Case(replace(LAYER_NORM, providers=()), TINY, 2, torch.float32, torch.device("cpu"))


@pytest.fixture
def environment():
    """Of a machine without a GPU, as result files have it."""
    return {
        "command": "c", "started": "2026-01-02T03:04:05", "commit": None, "gpu": None, "cpu": "a CPU", "cpu_count": 1,
        "threads": 1, "load_average": 0.0, "versions": {"torch": "9"},
    }  # fmt: skip


@pytest.fixture
def empty_shards(tmp_path):
    """A folder with two training and two test shards, for what only passes their names on."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in ("train-000000.tar", "train-000001.tar", "test-000000.tar", "test-000001.tar"):
        (folder / name).touch()
    return folder
