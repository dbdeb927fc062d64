"""NVIDIA DALI with its operators for the CPU, as a peer."""

from typing import Any

import numpy as np
import torch

from benchmarks.data_loading.variants import (
    CROP_RATIO,
    CROP_SCALE,
    IMAGE_KEYS,
    SHUFFLE_BUFFER,
    Batches,
    Dataset,
    Variant,
    bytes_shape,
)


def _batches(dataset: Dataset, workers: int, endless: bool) -> Batches:
    """Its threads do the work in place of processes: `workers` of them, one if that is 0."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    pipeline: Any = Pipeline(dataset.batch_size, max(1, workers), device_id=None, seed=0)
    with pipeline:
        readers: Any = fn.readers
        images, labels = readers.webdataset(  # finds the samples of the shards itself, before the first batch
            name="shards",
            paths=dataset.shards,
            ext=[IMAGE_KEYS, "cls"],
            missing_component_behavior="error",
            random_shuffle=True,
            initial_fill=min(SHUFFLE_BUFFER, dataset.samples),
        )
        images = fn.decoders.image_random_crop(
            images,
            device="cpu",
            output_type=types.RGB,
            random_area=CROP_SCALE,
            random_aspect_ratio=CROP_RATIO,
            num_attempts=10,
        )
        images = fn.resize(images, size=(dataset.image_size, dataset.image_size), interp_type=types.INTERP_LINEAR)
        pipeline.set_outputs(fn.flip(images, horizontal=fn.random.coin_flip()), labels)
    pipeline.build()
    left = pipeline.epoch_size("shards")
    while endless or left > 0:
        images, labels = pipeline.run()
        count = dataset.batch_size if endless else min(dataset.batch_size, left)
        numbers = torch.tensor([int(bytes(np.asarray(labels[index]))) for index in range(count)])
        yield torch.from_dlpack(images.as_tensor())[:count], numbers
        left -= count


DALI = Variant(
    "dali",
    "NVIDIA DALI's operators for the CPU: its WebDataset reader; libjpeg-turbo through nvImageCodec, decoding the crop "
    "alone; antialiased bilinear resize; bytes. As many threads as the others have workers, and one for none",
    ("nvidia.dali",),
    bytes_shape,
    torch.uint8,
    _batches,
    install="nvidia-dali-cuda120",
)
