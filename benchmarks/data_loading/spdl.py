"""SPDL, with FFmpeg's decoder and scaler, as a peer."""

import random
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from benchmarks.data_loading.variants import (
    IMAGE_KEYS,
    SHUFFLE_BUFFER,
    Batches,
    Dataset,
    Variant,
    bytes_shape,
    random_crop,
)

_ONE_PIXEL = cv2.imencode(".jpg", np.zeros((1, 1, 3), np.uint8))[1].tobytes()


def _batches(dataset: Dataset, workers: int, endless: bool) -> Batches:
    """Its threads do the work in place of processes: `workers` of them, one if that is 0."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    try:
        spdl.io.demux_image(_ONE_PIXEL)  # loads FFmpeg
    except RuntimeError as error:
        raise RuntimeError("SPDL finds no shared libraries of FFmpeg: install ffmpeg") from error
    size = dataset.image_size

    def decode(sample: tuple[bytes, int]) -> tuple[Any, int]:
        data, label = sample
        packets = spdl.io.demux_image(data)
        top, left, height, width = random_crop(packets.height, packets.width)
        mirrored = ",hflip" if random.random() < 0.5 else ""
        filters = f"crop={width}:{height}:{left}:{top}:exact=1,scale={size}:{size}:flags=bilinear{mirrored}"
        return spdl.io.decode_packets(packets, filter_desc=f"{filters},format=pix_fmts=rgb24"), label

    def stack(samples: list[tuple[Any, int]]) -> tuple[Tensor, Tensor]:
        frames, labels = zip(*samples, strict=True)
        return spdl.io.to_torch(spdl.io.convert_frames(list(frames))), torch.tensor(labels)

    threads = max(1, workers)
    pipeline = (
        PipelineBuilder()
        .add_source(_samples(dataset, endless))
        .pipe(decode, concurrency=threads, max_failures=0)
        .aggregate(dataset.batch_size)
        .pipe(stack, max_failures=0)
        .add_sink(2)
        .build(num_threads=threads)
    )
    with pipeline.auto_stop():
        yield from pipeline


def _samples(dataset: Dataset, endless: bool) -> Iterator[tuple[bytes, int]]:
    """Shuffled as the WebDataset variants shuffle: the order of shards, then a buffer of samples."""
    from spdl.io import iter_tarfile

    while True:
        buffer: list[tuple[bytes, int]] = []
        for shard in random.sample(dataset.shards, len(dataset.shards)):
            with open(shard, "rb") as file:
                for _, members in groupby(iter_tarfile(file), lambda member: _split(member[0])[0]):
                    sample = {_split(name)[1]: content for name, content in members}
                    image = next(sample[name] for name in IMAGE_KEYS.split(";") if name in sample)
                    buffer.append((image, int(sample["cls"])))
                    if len(buffer) >= SHUFFLE_BUFFER:
                        yield buffer.pop(random.randrange(len(buffer)))
        random.shuffle(buffer)
        yield from buffer
        if not endless:
            return


def _split(name: str) -> tuple[str, str]:
    """The key of a sample and the name of one of its members, as WebDataset tells them apart."""
    dot = name.find(".", name.rfind("/") + 1)
    return name[:dot], name[dot + 1 :]


SPDL = Variant(
    "spdl",
    "SPDL's pipeline: its reader of tars; decoding, cropping and scaling by FFmpeg, whose bilinear scaling averages as "
    "antialiasing does; bytes. As many threads as the others have workers, and one for none",
    ("spdl.io", "spdl.pipeline"),
    bytes_shape,
    torch.uint8,
    _batches,
    install="spdl",
)
