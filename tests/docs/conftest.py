"""What the walk-throughs begin with, small: photos, data sets in the layouts of their authors, official weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvit_engine.data.build.make import make_dataset
from tests.docs.reader import Reader
from tests.fastvit_engine.models.weights.official import random_arrays, save

CLASSES = ("bird", "dog", "insect", "reptile")
# For every `fastvit train` of a page: few steps of few images, without processes that load data. The page's resolution,
# recipe, weights and data stay.
SHORT = [
    "train.duration=3 steps",
    "train.global_batch_size=8",
    "schedule.warmup=1 step",
    "train.log_every=1",
    "data.num_workers=0",
]


def write_photo(path: Path, number: int, colour: int) -> None:
    """A smooth picture with a tint: what a photo of class `colour` is here."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 120, (4, 5, 3), dtype=np.uint8)
    coarse[..., colour % 3] += 60 + 20 * (colour // 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((80, 64)).save(path, quality=90)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """photos/ with four classes of five."""
    for colour, name in enumerate(CLASSES):
        for number in range(5):
            write_photo(tmp_path / "photos" / name / f"{number}.jpg", 10 * colour + number, colour)
    return tmp_path / "photos"


@pytest.fixture
def imagenet(tmp_path: Path, photos: Path) -> Path:
    """data/i1k: shards for training and evaluation, of four classes."""
    out = tmp_path / "data" / "i1k"
    make_dataset(str(photos), out, eval_fraction=0.4, workers=1, progress=lambda text: None)
    return out


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """pets/ as the authors of Oxford-IIIT Pets publish it, unpacked: three breeds."""
    folder, number = tmp_path / "pets", 0
    for split in ("trainval", "test"):
        rows = []
        for label, name in enumerate(("Abyssinian", "american_bulldog", "Bengal")):
            for _ in range(4):
                number += 1
                write_photo(folder / "images" / f"{name}_{number}.jpg", number, label)
                rows.append(f"{name}_{number} {label + 1} 1 1\n")
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"{split}.txt").write_text("".join(rows))
    return folder


@pytest.fixture
def vtab(tmp_path: Path) -> Path:
    """vtab-1k/dtd, a task with the lists of its splits."""
    folder, number = tmp_path / "vtab-1k" / "dtd", 0
    lists: dict[str, list[str]] = {}
    for split, images in (("train800", 8), ("val200", 4), ("test", 4)):
        for index in range(images):
            number += 1
            write_photo(folder / "images" / split / f"{number}.jpg", number, index % 4)
            lists.setdefault(split, []).append(f"images/{split}/{number}.jpg {index % 4}\n")
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for split, rows in lists.items():
        (folder / f"{split}.txt").write_text("".join(rows))
    return folder


@pytest.fixture
def official(tmp_path: Path) -> Callable[..., Path]:
    """official("ViT-B_16.npz", tanh=True) -> a small ViT for 224 pixels with random weights, in the official layout."""

    def write(name: str, **options: Any) -> Path:
        return save(tmp_path / name, random_arrays(grid=14, hidden=192, **options))

    return write


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    """Somebody in an empty folder, on a machine without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return Reader(tmp_path, SHORT)
