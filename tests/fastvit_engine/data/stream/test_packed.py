"""Images of different sizes in batches: a function of the step, as all others are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvit_engine.config import Config
from fastvit_engine.data import IterableData, prepare_data
from fastvit_engine.data.stream.batch_split import possible_splits
from fastvit_engine.errors import UserError
from fastvit_engine.packed_image import packed_bytes, read_grids, read_packed

BATCH = 12
PACKING = {"max_patches": 16, "min_patches": 3}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, write_tar: Any, photo: Callable[..., bytes]) -> Path:
    """40 photos of all proportions, one of which is no image."""
    folder = tmp_path_factory.mktemp("photos")
    members = []
    for n in range(40):
        content = b"\xff\xd8 not a photo" if n == 7 else photo(n, 20 + 7 * n % 90, 20 + 13 * n % 90)
        members += [(f"s{n:03d}.jpg", content), (f"s{n:03d}.cls", str(n % 3).encode())]
    for number, (begin, end) in enumerate([(0, 22), (22, 58), (58, 80)]):
        write_tar(folder / f"{number}.tar", members[begin:end])
    return folder


@pytest.fixture
def packed_config(make_config: Callable[..., Config]) -> Callable[..., Config]:
    def make(*args: Any, **kwargs: Any) -> Config:
        config = make_config(*args, batch=BATCH, **kwargs)
        return Config.model_validate(config.model_dump() | {"packing": PACKING})

    return make


def steps(config: Config, folder: Path, world_size: int, first: int, count: int, largest: int) -> list[list[Any]]:
    """For each global step the (key, image) of its samples in the order of their positions."""
    data = prepare_data(config, world_size=1, index_folder=folder)
    found: list[list[Any]] = [[None] * BATCH for _ in range(count)]
    split = next(possible_splits(config, world_size, largest))
    for rank in range(world_size):
        batches = data.train_batches(
            config,
            rank=rank,
            world_size=world_size,
            micro_batch_size=largest,
            consumed=first * BATCH,
            pin_memory=False,
        )
        for step in found:
            places = iter(split.positions(rank))
            for size in split.micro_batches(rank):
                batch = next(batches)
                assert batch.images.shape == (max(size, 1), packed_bytes(16, 4))
                for key, image in zip(batch.keys[:size], batch.images[:size], strict=True):
                    pixels = read_packed(image)
                    step[next(places)] = (key, pixels.shape, pixels.tobytes())
    return found


def test_steps_depend_on_no_split_worker_or_stop(
    photos: Path, packed_config: Callable[..., Config], tmp_path: Path
) -> None:
    expected = steps(packed_config(photos), tmp_path, 1, 0, 5, BATCH)
    shapes = {image[1] for step in expected for image in step}
    assert len(shapes) > 10 and all(height * width <= 256 for height, width, _ in shapes)
    for num_workers, world_size, first, largest in [(0, 2, 1, 6), (2, 3, 0, 2), (1, 5, 2, 1)]:
        config = packed_config(photos, num_workers=num_workers)
        assert steps(config, tmp_path, world_size, first, 5 - first, largest) == expected[first:]


def test_streams_have_them_too(photos: Path, packed_config: Callable[..., Config], tmp_path: Path) -> None:
    config = packed_config(photos, order="stream", streams=1)
    once, again = (steps(config, tmp_path, 1, first, 3 - first, BATCH) for first in (0, 1))
    assert once[1:] == again
    assert len({image[1] for step in once for image in step}) > 5


@pytest.mark.parametrize("order", ["indexed", "stream"])
def test_evaluation_sees_each_image_once_and_whole(
    order: str, photos: Path, packed_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = packed_config(photos, photos, order=order, allow_overlap=True, eval_crop=1.0)
    data = prepare_data(config, world_size=1, index_folder=tmp_path)
    found: dict[str, tuple[int, ...]] = {}
    for rank in range(2):
        for batch in data.eval_batches(config, rank=rank, world_size=2, batch_size=6, pin_memory=False):
            grids = read_grids(batch.images)
            for key, weight, grid in zip(batch.keys, batch.weights.tolist(), grids.tolist(), strict=True):
                if key:
                    assert key not in found
                    found[key] = tuple(grid)
                    assert weight == (key != "s007")
    assert len(found) == 40 and found["s007"] == (1, 1)
    for n in range(40):
        height, width = 20 + 7 * n % 90, 20 + 13 * n % 90
        rows, columns = found[f"s{n:03d}"]
        if n != 7:
            assert rows * columns <= 16
            assert (rows > columns) <= (height > width) and (rows < columns) <= (height < width)


def test_an_iterable_gives_squares(make_config: Callable[..., Config], tmp_path: Path) -> None:
    config = make_config("").model_copy(update={"packing": Config.model_validate({"packing": PACKING}).packing})
    image = {"image": np.zeros((16, 16, 3), np.uint8), "label": 0}
    with pytest.raises(UserError, match="packing.max_patches is 16, and training data is given as an iterable"):
        prepare_data(config, world_size=1, index_folder=tmp_path, given=IterableData([image]))
