"""This engine with the GPU as its decoder, if there is one."""

import torch

from benchmarks.data_loading.variants import Batches, Dataset, Variant, bytes_shape, in_batches, train_batches
from fastvit_engine.data.stream.gpu_decode import decoded_on, nvjpeg


def _batches(dataset: Dataset, workers: int, endless: bool) -> Batches:
    device = torch.device("cuda", torch.cuda.current_device())
    decode = nvjpeg(device)
    compressed = train_batches(dataset, workers, pin_memory=True, decoder="nvjpeg")
    for images, labels in in_batches(dataset, decoded_on(compressed, device, decode), endless):
        torch.cuda.current_stream().synchronize()
        yield images, labels


NVJPEG = Variant(
    "fastvit, nvJPEG",
    "this engine with data.decoder=nvjpeg: JPEGs are decoded, cropped and resized on the GPU; bytes there",
    ("torchvision",),
    bytes_shape,
    torch.uint8,
    _batches,
    on_gpu=True,
)
