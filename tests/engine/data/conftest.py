"""Small shards of real images, and configurations that read them."""

import io
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvit_engine.config import Config

Members = Iterable[tuple[str, bytes]]


def _encode(pixels: np.ndarray, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """encode(pixels, "JPEG" | "PNG" | "WEBP", **options) -> bytes"""
    return _encode


@pytest.fixture(scope="session")
def photo() -> Callable[..., bytes]:
    """photo(number, height=30, width=40) -> a JPEG with smooth content that differs from number to number"""

    def make(number: int, height: int = 30, width: int = 40) -> bytes:
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        return _encode(np.asarray(coarse.resize((width, height))), "JPEG", quality=90)

    return make


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, Members], Path]:
    """write_tar(path, [(member name, bytes), ...]) -> path; gzipped where the name ends in .gz"""

    def write(path: Path, members: Members) -> Path:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path

    return write


@pytest.fixture(scope="session")
def sample_members(photo: Callable[..., bytes]) -> Callable[[Iterable[int]], list[tuple[str, bytes]]]:
    """sample_members(numbers) -> image and label members of the samples s000, s001, ...; label = number % 3"""

    def make(numbers: Iterable[int]) -> list[tuple[str, bytes]]:
        pairs = [((f"s{n:03d}.jpg", photo(n)), (f"s{n:03d}.cls", str(n % 3).encode())) for n in numbers]
        return [member for pair in pairs for member in pair]

    return make


def _write_shards(folder: Path, write_tar: Any, sample_members: Any, gzipped: int | None) -> Path:
    start = 0
    for number, size in enumerate([5, 3, 8, 6, 1, 5, 7]):
        suffix = ".tar.gz" if number == gzipped else ".tar"
        write_tar(folder / f"part-{number}{suffix}", sample_members(range(start, start + size)))
        start += size
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, write_tar: Any, sample_members: Any) -> Path:
    """A folder of seven uneven shards with the samples s000 .. s034 in order."""
    return _write_shards(tmp_path_factory.mktemp("shards"), write_tar, sample_members, None)


@pytest.fixture(scope="session")
def gzipped_shards(tmp_path_factory: pytest.TempPathFactory, write_tar: Any, sample_members: Any) -> Path:
    """The same samples, with one shard of the seven gzipped."""
    return _write_shards(tmp_path_factory.mktemp("gzipped"), write_tar, sample_members, 2)


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Config]:
    """make_config(train, eval="", batch=8, **data) -> a configuration for 16-pixel images of three classes"""

    def make(
        train: Path | str | list[Any], eval: Path | str = "", batch: int = 8, seed: int = 0, **data: Any
    ) -> Config:
        data = {"num_workers": 0, "shuffle_buffer": 4} | data
        train = train if isinstance(train, list) else str(train)
        return Config.model_validate(
            {
                "seed": seed,
                "model": {"name": "Ti/4", "image_size": 16, "num_classes": 3},
                "data": {"train": train, "eval": str(eval)} | data,
                "train": {"global_batch_size": batch},
            }
        )

    return make


@pytest.fixture(scope="session")
def real_data(pytestconfig: pytest.Config) -> Path:
    """The folder with real shards beside the repository."""
    folder = pytestconfig.rootpath.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real shards at {folder}")
    return folder
