"""The ways of turning shards into training batches that are measured against each other.

All take random crops of 8 to 100 % of the area and mirror half of them. Each provider runs as its own users would run
it; if one is not installed or fails here, the results say why instead.
"""

import importlib.util
import io
import logging
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from fastvit_engine.config import Config
from fastvit_engine.data import Batch, prepare_data
from fastvit_engine.data.check.speed import time_stages
from fastvit_engine.data.pixels import jpeg_part
from fastvit_engine.data.pixels.crops import inception_crop
from fastvit_engine.data.stream.indexed import IndexedData
from fastvit_engine.torchvision_operators import declare_torchvision_operators

CROP_SCALE, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
IMAGE_KEYS = "jpg;jpeg;png;webp"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHUFFLE_BUFFER = 1000  # samples, of the loaders that shuffle what they read in order
_ANY_CLASS = 10_000_000  # the most that a model may have: labels are not what is measured

Batches = Iterator[tuple[Tensor, Tensor]]  # (images, labels)


class StageTimes(NamedTuple):
    """CPU seconds for the same number of images, one after the other in one process without batches."""

    read: float
    decode: float
    crop: float  # cropping, resizing, mirroring
    to_float: float  # and normalising; 0 where bytes go to the device


class Dataset(NamedTuple):
    """Shards to measure on."""

    name: str
    shards: list[str]
    data: IndexedData
    config: Config  # of this engine
    image_size: int
    batch_size: int
    samples: int


@dataclass(frozen=True)
class Variant:
    """`batches(dataset, workers, endless)` and `stages(dataset, images)`, if its stages can be told apart."""

    name: str
    title: str
    packages: tuple[str, ...]  # modules that it imports; none: it is this engine's own
    image_shape: Callable[[int], tuple[int, ...]]
    dtype: torch.dtype
    batches: Callable[[Dataset, int, bool], Batches]
    stages: Callable[[Dataset, int], StageTimes] | None = None
    exact: bool = True  # an epoch has each sample once
    install: str = ""  # what pip installs it from
    on_gpu: bool = False

    def missing(self) -> str | None:
        """What is not installed and how to install it, or that there is no GPU; None if it can be measured."""
        if self.on_gpu and not torch.cuda.is_available():
            return "no GPU"
        absent = [package for package in self.packages if not _is_installed(package)]
        if not absent:
            return None
        return f"{' and '.join(absent)} not installed: pip install {self.install or ' '.join(absent)}"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that holds it
        return False


def open_dataset(
    name: str, pattern: str, image_size: int, batch_size: int, scratch: Path, *, index: Path | None = None
) -> Dataset:
    """Finds or makes the index, unless it is given; UserError where the shards cannot be trained on."""
    config = Config.model_validate(
        {
            "model": {"name": f"Ti/{image_size}", "image_size": image_size, "num_classes": _ANY_CLASS},
            "data": {
                "train": pattern,
                "index": index and str(index),
                "image_key": IMAGE_KEYS,
                "lanes": 1,  # so that an epoch has every sample
            },
            "augment": {"crop_scale": CROP_SCALE, "crop_ratio": CROP_RATIO},
            "train": {"global_batch_size": batch_size},
        }
    )
    data = prepare_data(config, world_size=1, index_folder=scratch)
    assert isinstance(data, IndexedData)
    shards = [shard for source in data.train for shard in source.data.shards]
    return Dataset(name, shards, data, config, image_size, batch_size, sum(source.samples for source in data.train))


# ---- this engine


def _our_batches(dataset: Dataset, workers: int, endless: bool) -> Batches:
    yield from in_batches(dataset, train_batches(dataset, workers), endless)


def train_batches(dataset: Dataset, workers: int, *, pin_memory: bool = False, **data: Any) -> Iterator[Batch]:
    """This engine's batches, without end. data: more keys of that section."""
    keys = {"num_workers": workers, **data}
    config = dataset.config.model_copy(update={"data": dataset.config.data.model_copy(update=keys)})
    return dataset.data.train_batches(
        config, rank=0, world_size=1, micro_batch_size=dataset.batch_size, consumed=0, pin_memory=pin_memory
    )


def in_batches(dataset: Dataset, batches: Iterator[Batch], endless: bool) -> Batches:
    """Images and labels of these batches: without end, or of an epoch."""
    size, given = dataset.batch_size, 0
    try:
        for batch in batches:
            count = size if endless else min(size, dataset.samples - given)
            yield batch.images[:count], batch.labels[:count]
            given += count
            if not endless and given == dataset.samples:
                return
    finally:
        batches.close()  # type: ignore[attr-defined]  # a generator


def _our_stages(dataset: Dataset, count: int) -> StageTimes:
    return StageTimes(*time_stages(dataset.config, dataset.data, count).cpu, 0.0)


@contextmanager
def _whole_rows() -> Iterator[None]:
    """Nothing above or beside a crop is left out, here and in processes that are forked."""
    worth, jpeg_part.WORTH = jpeg_part.WORTH, sys.maxsize
    try:
        yield
    finally:
        jpeg_part.WORTH = worth


def _our_batches_of_whole_rows(dataset: Dataset, workers: int, endless: bool) -> Batches:
    with _whole_rows():
        yield from _our_batches(dataset, workers, endless)


def _our_stages_of_whole_rows(dataset: Dataset, count: int) -> StageTimes:
    with _whole_rows():
        return _our_stages(dataset, count)


# ---- WebDataset


def _webdataset(dataset: Dataset, endless: bool) -> Any:
    import webdataset as wds

    data = wds.WebDataset(
        dataset.shards, shardshuffle=len(dataset.shards), detshuffle=True, seed=0, empty_check=False
    ).shuffle(SHUFFLE_BUFFER)
    return data.repeat() if endless else data


def _webloader(dataset: Dataset, workers: int, endless: bool, transform: Callable[[bytes, int], Tensor]) -> Batches:
    import webdataset as wds

    pipeline = (
        _webdataset(dataset, endless)
        .to_tuple(IMAGE_KEYS, "cls")
        .map_tuple(_Sized(transform, dataset.image_size), int)
        .batched(dataset.batch_size, collation_fn=_collate, partial=True)
    )
    loader = wds.WebLoader(pipeline, batch_size=None, num_workers=workers, **_prefetch(workers))
    yield from loader


class _Sized:
    def __init__(self, transform: Callable[[bytes, int], Tensor], size: int) -> None:
        self.transform, self.size = transform, size

    def __call__(self, data: bytes) -> Tensor:
        return self.transform(data, self.size)


def _prefetch(workers: int) -> dict[str, int]:
    return {"prefetch_factor": 2} if workers else {}


def _collate(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels)


def random_crop(height: int, width: int) -> tuple[int, int, int, int]:
    return inception_crop(height, width, CROP_SCALE, CROP_RATIO, [random.random() for _ in range(40)])


def _staged(dataset: Dataset, count: int, *steps: Callable[..., Any]) -> StageTimes:
    """Each image from WebDataset through the steps, on the clock."""
    totals = [0.0] * 4
    samples = iter(_webdataset(dataset, endless=True).to_tuple(IMAGE_KEYS, "cls"))
    next(samples)  # fills the shuffle buffer
    for _ in range(count):
        clock = process_time()
        value, label = next(samples)
        int(label)
        totals[0] += process_time() - clock
        for stage, step in enumerate(steps, start=1):
            clock = process_time()
            value = step(value, dataset.image_size)
            totals[stage] += process_time() - clock
    return StageTimes(*totals)


def _pil_decode(data: bytes, size: int) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _pil_crop(image: Image.Image, size: int) -> Image.Image:
    """torchvision's RandomResizedCrop (bilinear, antialias) and RandomHorizontalFlip of a Pillow image."""
    top, left, height, width = random_crop(image.height, image.width)
    image = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image


def _to_float(image: Image.Image, size: int) -> Tensor:
    """torchvision's ToTensor and Normalize."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return pixels.clone().sub_(mean).div_(std)


def _recipe(data: bytes, size: int) -> Tensor:
    return _to_float(_pil_crop(_pil_decode(data, size), size), size)


def _fast_decode(data: bytes, size: int) -> np.ndarray:
    if data[:2] != b"\xff\xd8":  # no JPEG
        return np.asarray(_pil_decode(data, size))
    return simplejpeg.decode_jpeg(data, "RGB", strict=False)


def _fast_crop(image: np.ndarray, size: int) -> Tensor:
    top, left, height, width = random_crop(*image.shape[:2])
    image = cv2.resize(image[top : top + height, left : left + width], (size, size))
    return torch.from_numpy(cv2.flip(image, 1) if random.random() < 0.5 else image)


def _fast(data: bytes, size: int) -> Tensor:
    return _fast_crop(_fast_decode(data, size), size)


# ---- timm


def _timm_batches(dataset: Dataset, workers: int, endless: bool) -> Batches:
    """timm's reader and its own transforms; bytes leave the workers, as its prefetcher normalises on the device."""
    declare_torchvision_operators()
    from timm.data import create_dataset, create_loader

    logging.getLogger("timm").setLevel(logging.ERROR)  # it misses an info.json that it does not need
    samples = dataset.samples * (10_000 if endless else 1)  # of an epoch, for which it repeats the shards
    data = create_dataset(
        "wds/",
        root=str(Path(dataset.shards[0]).parent),
        split=f"{'::'.join(dataset.shards)}|{samples}",
        is_training=True,
        batch_size=dataset.batch_size,
    )
    settings: dict[str, Any] = {"color_jitter": None, "interpolation": "bilinear", "persistent_workers": False}
    loader = create_loader(
        data,
        input_size=(3, dataset.image_size, dataset.image_size),
        batch_size=dataset.batch_size,
        is_training=True,
        scale=CROP_SCALE,
        ratio=CROP_RATIO,
        num_workers=workers,
        device=torch.device("cpu"),
        **settings,
    )
    yield from loader.loader


def bytes_shape(size: int) -> tuple[int, ...]:
    return (size, size, 3)


def _planes_shape(size: int) -> tuple[int, ...]:
    return (3, size, size)


VARIANTS = (
    Variant(
        "fastvit",
        "this engine: indexed reads, exact order; simplejpeg and OpenCV, bytes",
        (),
        bytes_shape,
        torch.uint8,
        _our_batches,
        _our_stages,
    ),
    Variant(
        "fastvit, whole rows",
        "the same to the byte, decoding all that is above and beside a crop, as without restart markers",
        (),
        bytes_shape,
        torch.uint8,
        _our_batches_of_whole_rows,
        _our_stages_of_whole_rows,
    ),
    Variant(
        "wds + PIL",
        "the usual recipe: WebLoader; Pillow decode, crop and antialiased bilinear resize, float32",
        ("webdataset",),
        _planes_shape,
        torch.float32,
        lambda dataset, workers, endless: _webloader(dataset, workers, endless, _recipe),
        lambda dataset, count: _staged(dataset, count, _pil_decode, _pil_crop, _to_float),
    ),
    Variant(
        "wds + simplejpeg",
        "WebLoader; simplejpeg and OpenCV, bytes",
        ("webdataset",),
        bytes_shape,
        torch.uint8,
        lambda dataset, workers, endless: _webloader(dataset, workers, endless, _fast),
        lambda dataset, count: _staged(dataset, count, _fast_decode, _fast_crop),
    ),
    Variant(
        "timm",
        "timm's WebDataset reader, transforms and loader; Pillow, antialiased bilinear resize, bytes",
        ("timm", "torchvision", "webdataset"),
        _planes_shape,
        torch.uint8,
        _timm_batches,
        exact=False,  # it rounds up to whole batches in each worker
    ),
)
