"""Decodes the compressed images of batches on the GPU with nvJPEG, while the batch before is trained on."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_engine.config import Config
from fastvit_engine.data.pixels.compressed import HEADER, Recipe, image_size_of, read_recipes
from fastvit_engine.data.pixels.decode import Jpeg, PixelBuffer, open_image
from fastvit_engine.data.stream.batch import BadSample, Batch, leaves_compressed
from fastvit_engine.errors import UserError
from fastvit_engine.storage.source import one_line

# JPEGs, uint8 [n] each on the host, to pixels on the device, uint8 [3, H, W]. Raises RuntimeError if one is damaged.
Decode = Callable[[list[Tensor]], list[Tensor]]

_AHEAD = 1  # batches


class _Decoded(NamedTuple):
    batch: Batch
    ready: torch.cuda.Event | None  # on the GPU


def check_nvjpeg(config: Config, *, own_data: bool, on_gpu: bool, here: bool) -> None:
    """Raises UserError if the GPU is to decode and cannot. own_data: images come decoded; here: on this machine."""
    if not leaves_compressed(config):
        return
    if own_data:
        raise UserError(
            "data.decoder = nvjpeg decodes images of shards, and an iterable of your own gives pixels: set "
            "data.decoder=cpu, or train on shards"
        )
    if not on_gpu:
        raise UserError("data.decoder = nvjpeg needs an NVIDIA GPU, and this run has none: set data.decoder=cpu")
    if here:
        nvjpeg(torch.device("cuda", torch.cuda.current_device()))


def nvjpeg(device: torch.device) -> Decode:
    """torchvision's decoder on this GPU. Raises UserError if there is none, or if it does not work."""
    if torch.version.cuda is None:
        raise UserError("data.decoder = nvjpeg needs a PyTorch with CUDA, which this is not: set data.decoder=cpu")
    try:
        from torchvision.io import ImageReadMode, decode_jpeg  # noqa: PLC0415 - an optional package
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"data.decoder = nvjpeg needs torchvision, which cannot be imported ({error}): install the build that "
            "belongs to this PyTorch, or set data.decoder=cpu"
        ) from error

    def decode(jpegs: list[Tensor]) -> list[Tensor]:
        # It decodes on a stream of its own, into memory that this stream may still read: of images that were let go of.
        torch.cuda.current_stream(device).synchronize()
        return decode_jpeg(jpegs, ImageReadMode.RGB, device)

    try:
        decode([_one_jpeg()])
    except RuntimeError as error:
        raise UserError(
            f"data.decoder = nvjpeg, and torchvision {version('torchvision')} cannot decode on this GPU "
            f"({one_line(error)}): install the build that belongs to this PyTorch, or set data.decoder=cpu"
        ) from error
    return decode


def _one_jpeg() -> Tensor:
    """Of 16 black pixels squared, uint8 [n]."""
    return torch.frombuffer(bytearray(simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8))), dtype=torch.uint8)


def decoded_on(batches: Iterator[Batch], device: torch.device, decode: Decode) -> Iterator[Batch]:
    """The same batches with images uint8 [B, S, S, 3] on the device, for batches whose images are `compressed`.

    One batch is decoded ahead, in a thread and on a stream of its own.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def decoded(batch: Batch) -> _Decoded:
        with torch.cuda.stream(stream):  # None: nothing changes
            made = decode_batch(batch, device, decode)
            return _Decoded(made, stream.record_event() if stream else None)

    waiting: deque[Future[_Decoded]] = deque()
    with ThreadPoolExecutor(1, "nvjpeg") as pool:
        try:
            for batch in batches:
                waiting.append(pool.submit(decoded, batch))
                if len(waiting) > _AHEAD:
                    yield _received(waiting.popleft().result())
            while waiting:
                yield _received(waiting.popleft().result())
        finally:
            batches.close()  # type: ignore[attr-defined]  # a generator


def _received(decoded: _Decoded) -> Batch:
    """For the current stream."""
    if decoded.ready is not None:
        current = torch.cuda.current_stream()
        current.wait_event(decoded.ready)
        decoded.batch.images.record_stream(current)
    return decoded.batch


def decode_batch(batch: Batch, device: torch.device, decode: Decode) -> Batch:
    """A batch with images uint8 [B, S, S, 3] on the device. One that nothing decodes gets weight 0 and is bad."""
    rows, size = batch.images, image_size_of(batch.images.shape[1])
    recipes = read_recipes(rows.numpy())
    pixels = [number for number, recipe in enumerate(recipes) if recipe.size == 0]
    packed = [number for number, recipe in enumerate(recipes) if recipe.size]
    images = torch.empty(len(rows), size, size, 3, dtype=torch.uint8, device=device)
    if pixels:
        images[pixels] = rows[pixels, HEADER:].view(-1, size, size, 3).to(device)
    found = _decode([rows[number, HEADER : HEADER + recipes[number].size] for number in packed], device, decode)
    weights, bad = batch.weights, list(batch.bad)
    for number, image in zip(packed, found, strict=True):
        if isinstance(image, Tensor):
            images[number] = resized_box(image, recipes[number], size)
            continue
        if weights is batch.weights:
            weights = weights.clone()
        images[number], weights[number] = 0, 0
        bad.append(BadSample(batch.keys[number], "", f"has an image that cannot be decoded ({image})"))
    return batch._replace(images=images, weights=weights, bad=tuple(bad))


def _decode(jpegs: list[Tensor], device: torch.device, decode: Decode) -> Sequence[Tensor | ValueError]:
    """Each JPEG as uint8 [3, H, W], or why it cannot be decoded. Raises RuntimeError if the decoder is at fault."""
    if not jpegs:
        return []
    try:
        return decode(jpegs)
    except RuntimeError as error:  # torchvision raises it for damage, and for everything else
        if "out of memory" in str(error):
            raise
        alone = [_decode_alone(jpeg, decode) for jpeg in jpegs]
        if len(jpegs) > 1 and all(image is None for image in alone):
            raise
    return [_decode_damaged(jpeg, device) if image is None else image for jpeg, image in zip(jpegs, alone, strict=True)]


def _decode_alone(jpeg: Tensor, decode: Decode) -> Tensor | None:
    try:
        return decode([jpeg])[0]
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise
        return None


def _decode_damaged(jpeg: Tensor, device: torch.device) -> Tensor | ValueError:
    """As far as it goes, as without a GPU."""
    try:
        image = open_image(jpeg.numpy().tobytes())
        assert isinstance(image, Jpeg)
        return torch.from_numpy(image.decode(PixelBuffer()).transpose(2, 0, 1)).to(device)
    except ValueError as error:
        return error


def resized_box(image: Tensor, recipe: Recipe, size: int) -> Tensor:
    """uint8 [S, S, 3] of an image, uint8 [3, H, W]: what `render` makes of it on the CPU, but for rounding."""
    by = recipe.reduction
    top, left = recipe.top // by * by, recipe.left // by * by  # squares are those of the whole image
    bottom, right = -(-recipe.box.bottom // by) * by, -(-recipe.box.right // by) * by
    box = image[None, :, top:bottom, left:right].float()
    if by > 1:
        box = F.avg_pool2d(box, by, ceil_mode=True, count_include_pad=False)
    pixels = F.interpolate(box, (size, size), mode="bilinear", align_corners=False)[0]
    if recipe.mirrored:
        pixels = pixels.flip(2)
    return pixels.round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0)
