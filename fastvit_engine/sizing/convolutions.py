"""How many bytes the convolutions of a ResNet keep for the backward pass: counted map by map, as autograd saves them.

c is the bytes of a computed number. A convolution keeps its input, GroupNorm its input, ReLU its output, which is the
next convolution's input; a convolution also keeps its weights, standardised, once for all images.
"""

import math
from collections.abc import Iterator

from fastvit_engine.config.resnet_shape import ResNetShape, side

_INDEX = 8  # bytes of the position of a maximum


def convolution_bytes(resnet: ResNetShape, image_size: int, compute: int) -> int:
    """Kept of one image, from the normalised image to the last map, which the last block keeps."""
    return (
        compute * sum(_stem(resnet, image_size))
        + _INDEX * _pooled(resnet, image_size)
        + compute * sum(_blocks(resnet, image_size))
    )


def weight_bytes(resnet: ResNetShape, compute: int) -> int:
    """Kept whatever the number of images: the standardised weights."""
    return compute * sum(math.prod(one.shape) for one in resnet.convolutions())


def passing_bytes(resnet: ResNetShape, image_size: int, compute: int) -> int:
    """Of one image, while it passes through the largest layer: its input and result, and one more or a gradient."""
    return 3 * compute * max(one.outputs * side(image_size, one.halvings) ** 2 for one in resnet.convolutions())


def _pooled(resnet: ResNetShape, image_size: int) -> int:
    return resnet.width * side(image_size, 2) ** 2


def _stem(resnet: ResNetShape, image_size: int) -> Iterator[int]:
    """Numbers: the image, what is pooled, and in hybrids the input of the norm and the result of the ReLU."""
    half = side(image_size, 1)
    if resnet.preactivation:
        yield 3 * image_size**2
        yield resnet.width * (half + 2) ** 2
        yield _pooled(resnet, image_size)
    else:
        yield 3 * _padded(image_size, 7) ** 2
        yield 2 * resnet.width * half**2
        yield resnet.width * _padded(half, 3) ** 2
        yield _pooled(resnet, image_size)


def _blocks(resnet: ResNetShape, image_size: int) -> Iterator[int]:
    """Numbers of each block, without its input, which the one before it keeps; at last those of the final norm."""
    inputs, halvings = resnet.width, 2
    for stage, blocks in enumerate(resnet.stages):
        middle, outputs = resnet.width * 2**stage, 4 * resnet.width * 2**stage
        for block in range(blocks):
            strided = stage > 0 and block == 0
            before, after = side(image_size, halvings), side(image_size, halvings + strided)
            halvings += strided
            yield 2 * middle * (before**2 + after**2)  # before and after the norms of both convolutions
            if resnet.preactivation:
                yield inputs * before**2 + outputs * after**2  # the normalised input, and the result
            else:
                yield (3 if block == 0 else 2) * outputs * after**2  # before the norms, the shortcut's too; the result
                padded = _padded(before, 3)
                yield middle * padded**2 if strided and padded > before else 0
            inputs = outputs
    if resnet.preactivation:
        yield inputs * side(image_size, halvings) ** 2


def _padded(size: int, kernel: int) -> int:
    """As TensorFlow pads before a layer of stride 2."""
    return size + max((math.ceil(size / 2) - 1) * 2 + kernel - size, 0)
