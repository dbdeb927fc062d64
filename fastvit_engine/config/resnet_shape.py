"""The ResNets of BiT, and those before the Transformer of a hybrid: which convolutions a name stands for.

Needs no PyTorch: names are checked early, and counted fast.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

# Bottleneck blocks of each stage, by the number of layers. 50 and 101: He et al. 2016, Table 1; 152 and 200: the
# ResNet-v2 of BiT (Kolesnikov et al. 2020), whose second and third stage are those of He et al. 2016, section 4.2.
_BIT_STAGES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}
# Of a hybrid, by its name before the "+" and its patch size (Dosovitskiy et al. 2021, section 3.1; the models R and R26
# of Steiner et al. 2022). R50 at 16 has the blocks of its last stage in the third, so that the grid is twice as fine.
_HYBRID_STAGES: dict[tuple[str, int], tuple[int, ...]] = {
    ("R", 16): (),
    ("R26", 32): (2, 2, 2, 2),
    ("R50", 16): (3, 4, 9),
    ("R50", 32): (3, 4, 6, 3),
}
_ROOT = 64  # channels after the first convolution, at factor 1
_WIDEST = 16  # factor: the widest of the papers is 4
_EXPANSION = 4  # outputs of a bottleneck block, in channels of its middle
_R_CELLS = 8  # rows and columns of a patch of R+Ti/16, in cells of the map that the stem gives

BIT_NAMES = ("R50x1", "R50x3", "R101x1", "R101x3", "R152x1", "R152x2", "R152x4", "R200x3")
HYBRID_NAMES = ("R+Ti/16", "R26+S/32", "R26+B/32", "R50+B/16", "R50+B/32", "R50+L/16", "R50+L/32")


class Convolution(NamedTuple):
    """One convolution; its parameter is NAME.weight [outputs, inputs, kernel, kernel]."""

    name: str
    inputs: int
    outputs: int
    kernel: int
    stride: int
    halvings: int  # of the image's height and width, rounded up each time, until what it gives

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of its weight."""
        return self.outputs, self.inputs, self.kernel, self.kernel


@dataclass(frozen=True)
class ResNetShape:
    """The numbers of a ResNet.

    stages: bottleneck blocks of each. width: channels after the first convolution. preactivation: whether a block
    normalises its input, as in BiT, or its results, as in hybrids.
    """

    stages: tuple[int, ...]
    width: int = _ROOT
    preactivation: bool = False

    @property
    def channels(self) -> int:
        """Of the map that it gives."""
        return self.width * _EXPANSION * 2 ** (len(self.stages) - 1) if self.stages else self.width

    @property
    def halvings(self) -> int:
        """How often the image's height and width are halved, rounded up each time."""
        return 2 + max(len(self.stages) - 1, 0)

    def convolutions(self) -> Iterator[Convolution]:
        """All of them, in the order of the parameters; names are timm's."""
        yield Convolution("stem.conv" if self.stages else "conv", 3, self.width, 7, 2, 1)
        inputs, halvings = self.width, 2
        for stage, blocks in enumerate(self.stages):
            middle = self.width * 2**stage
            outputs = _EXPANSION * middle
            for block in range(blocks):
                name, stride = f"stages.{stage}.blocks.{block}", 2 if stage and not block else 1
                before, halvings = halvings, halvings + (stride == 2)
                if block == 0:
                    yield Convolution(f"{name}.downsample.conv", inputs, outputs, 1, stride, halvings)
                yield Convolution(f"{name}.conv1", inputs, middle, 1, 1, before)
                yield Convolution(f"{name}.conv2", middle, middle, 3, stride, halvings)
                yield Convolution(f"{name}.conv3", middle, outputs, 1, 1, halvings)
                inputs = outputs

    def macs(self, image_size: int) -> int:
        """Multiply-accumulates of the convolutions for one image."""
        return sum(math.prod(one.shape) * side(image_size, one.halvings) ** 2 for one in self.convolutions())


def side(image_size: int, halvings: int) -> int:
    """Height and width of a map after so many convolutions or poolings of stride 2, each of which rounds up."""
    return -(-image_size // 2**halvings)


def bit_shape(name: str) -> ResNetShape | None:
    """The ResNet that a name such as "R50x1" stands for: layers, and a factor of all widths. None for other names."""
    match = re.fullmatch(r"R(\d{1,4})x(\d{1,3})", name)
    if match is None or int(match[1]) not in _BIT_STAGES or not 1 <= int(match[2]) <= _WIDEST:
        return None
    return ResNetShape(_BIT_STAGES[int(match[1])], _ROOT * int(match[2]), preactivation=True)


def bit_name(shape: ResNetShape) -> str | None:
    """The name of a ResNet of BiT; None if it has none."""
    layers = next((layers for layers, stages in _BIT_STAGES.items() if stages == shape.stages), None)
    factor, rest = divmod(shape.width, _ROOT)
    return None if layers is None or rest or not 1 <= factor <= _WIDEST else f"R{layers}x{factor}"


@dataclass(frozen=True)
class Hybrid:
    """What stands before the Transformer of a hybrid, and the name of the Transformer's size.

    cells: rows and columns of one patch, in cells of the map that the ResNet gives.
    """

    size: str
    resnet: ResNetShape
    cells: int

    @property
    def patch_size(self) -> int:
        """Rows and columns of a patch, in pixels: twice what the name R+Ti/16 says."""
        return self.cells * 2**self.resnet.halvings


def hybrid_of(name: str) -> Hybrid | None:
    """The hybrid that a name such as "R50+B/16" stands for; None if it is no name of a hybrid.

    Which sizes there are is left to the caller.
    """
    match = re.fullmatch(r"(R\d{0,4})\+(\w+)/(\d{1,5})", name)
    stages = None if match is None else _HYBRID_STAGES.get((match[1], int(match[3])))
    if match is None or stages is None:
        return None
    return Hybrid(match[2], ResNetShape(stages), 1 if stages else _R_CELLS)


def hybrid_name(resnet: ResNetShape, size: str) -> str | None:
    """The name of a hybrid of this ResNet and this size of Transformer; None if it has none."""
    for (stem, patch), stages in _HYBRID_STAGES.items():
        if ResNetShape(stages) == resnet:
            return f"{stem}+{size}/{patch}"
    return None
