"""The layers of ResNets with GroupNorm and standardised weights, under the parameter names of timm.

Two codes of the authors differ in small numbers: that of BiT (Kolesnikov et al. 2020, arXiv:1912.11370) and that of the
hybrids (Dosovitskiy et al. 2021). `Convention` has the numbers of each, and every layer is given one.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit_engine.config.resnet_shape import ResNetShape
from fastvit_engine.models.initial import lecun_normal_

_GROUPS = 32
_LEAST_DEVIATION = 1e-12  # of weights that are all equal, whose gradient is zero


@dataclass(frozen=True)
class Convention:
    """How one of the codes normalises and pads.

    norm_eps: what GroupNorm adds to the variance. Weights are divided by sqrt(variance + variance_eps) + deviation_eps.
    same_padding: what is odd to pad goes to the right and below, as TensorFlow pads, and not on all sides alike.
    """

    norm_eps: float
    variance_eps: float
    deviation_eps: float
    same_padding: bool


BIT = Convention(norm_eps=1e-5, variance_eps=1e-10, deviation_eps=0.0, same_padding=False)
HYBRID = Convention(norm_eps=1e-6, variance_eps=0.0, deviation_eps=1e-5, same_padding=True)


class StdConv(nn.Conv2d):
    """A convolution whose weights are standardised, for each output (Qiao et al. 2019): weight [O, I, K, K]."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, convention: Convention) -> None:
        pads = convention.same_padding and stride > 1
        super().__init__(inputs, outputs, kernel, stride, 0 if pads else kernel // 2, bias=False)
        self.convention, self.pads = convention, pads

    def forward(self, x: Tensor) -> Tensor:
        if self.pads:
            x = pad_same(x, self.kernel_size[0], self.stride[0])
        weight: Tensor = _Standardised.apply(self.weight, self.convention.variance_eps, self.convention.deviation_eps)
        return F.conv2d(x, weight, None, self.stride, self.padding)


class _Standardised(torch.autograd.Function):
    """Keeps nothing for the backward pass but the weight itself and two numbers for each output."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, variance_eps: float, deviation_eps: float) -> Tensor:
        rows = _rows(weight)  # [O, I K K]
        mean = rows.mean(dim=1, keepdim=True)
        deviation = (rows.var(dim=1, keepdim=True, correction=0) + variance_eps).sqrt()
        ctx.save_for_backward(weight, mean, deviation)
        ctx.eps = deviation_eps
        return ((rows - mean) / (deviation + deviation_eps)).to(weight.dtype).view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight, mean, deviation = ctx.saved_tensors
        gradient, centred = _rows(gradients[0]), _rows(weight) - mean
        scale = 1 / (deviation + ctx.eps)
        slope = scale.square() / deviation.clamp(min=_LEAST_DEVIATION)  # of the scale, in the variance
        along = (gradient * centred).mean(dim=1, keepdim=True)
        result = scale * (gradient - gradient.mean(dim=1, keepdim=True)) - slope * along * centred
        return result.to(weight.dtype).view_as(weight), None, None


def _rows(weight: Tensor) -> Tensor:
    return weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))


def pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros around a map [B, C, H, W], so that a convolution gives ceil(H / stride) rows; the odd one below."""
    pads = []
    for size in (x.shape[3], x.shape[2]):
        missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        pads += [missing // 2, missing - missing // 2]
    return F.pad(x, pads) if any(pads) else x


class Norm(nn.GroupNorm):
    """GroupNorm of 32 groups (Wu and He 2018), and a ReLU unless `activate` is False: weight, bias [C]."""

    def __init__(self, channels: int, convention: Convention, *, activate: bool = True) -> None:
        super().__init__(_GROUPS, channels, eps=convention.norm_eps)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return F.relu(x, inplace=True) if self.activate else x


class Stem(nn.Module):
    """The first convolution and the pooling, [B, 3, H, W] -> [B, C, H / 4, W / 4]; between them, in hybrids, a norm."""

    def __init__(self, shape: ResNetShape, convention: Convention) -> None:
        super().__init__()
        self.conv = StdConv(3, shape.width, 7, 2, convention)
        self.norm = None if shape.preactivation else Norm(shape.width, convention)
        self.same_padding = convention.same_padding

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x if self.norm is None else self.norm(x)
        # BiT pads with zeros, also where all is negative, as its first code has it.
        x = pad_same(x, 3, 2) if self.same_padding else F.pad(x, (1, 1, 1, 1))
        return F.max_pool2d(x, 3, 2)


class Downsample(nn.Module):
    """The shortcut of the first block of a stage: a convolution and, in hybrids, a norm."""

    def __init__(self, inputs: int, outputs: int, stride: int, convention: Convention, *, with_norm: bool) -> None:
        super().__init__()
        self.conv = StdConv(inputs, outputs, 1, stride, convention)
        self.norm = Norm(outputs, convention, activate=False) if with_norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.norm is None else self.norm(x)


class PreactivationBlock(nn.Module):
    """The bottleneck of BiT, normalised before each convolution (He et al. 2016): [B, I, H, W] -> [B, O, H', W']."""

    def __init__(self, inputs: int, middle: int, outputs: int, stride: int, first: bool, convention: Convention):
        super().__init__()
        self.downsample = Downsample(inputs, outputs, stride, convention, with_norm=False) if first else None
        self.norm1 = Norm(inputs, convention)
        self.conv1 = StdConv(inputs, middle, 1, 1, convention)
        self.norm2 = Norm(middle, convention)
        self.conv2 = StdConv(middle, middle, 3, stride, convention)
        self.norm3 = Norm(middle, convention)
        self.conv3 = StdConv(middle, outputs, 1, 1, convention)

    def forward(self, x: Tensor) -> Tensor:
        normalised = self.norm1(x)
        shortcut = x if self.downsample is None else self.downsample(normalised)
        x = self.conv2(self.norm2(self.conv1(normalised)))
        return shortcut + self.conv3(self.norm3(x))


class Block(nn.Module):
    """The bottleneck of hybrids, normalised after each convolution: [B, I, H, W] -> [B, O, H', W']."""

    def __init__(self, inputs: int, middle: int, outputs: int, stride: int, first: bool, convention: Convention):
        super().__init__()
        self.downsample = Downsample(inputs, outputs, stride, convention, with_norm=True) if first else None
        self.conv1 = StdConv(inputs, middle, 1, 1, convention)
        self.norm1 = Norm(middle, convention)
        self.conv2 = StdConv(middle, middle, 3, stride, convention)
        self.norm2 = Norm(middle, convention)
        self.conv3 = StdConv(middle, outputs, 1, 1, convention)
        self.norm3 = Norm(outputs, convention, activate=False)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return F.relu(shortcut + self.norm3(self.conv3(x)))


class Stage(nn.Module):
    """Blocks of one resolution, of which the first changes it."""

    def __init__(self, shape: ResNetShape, stage: int, convention: Convention) -> None:
        super().__init__()
        middle = shape.width * 2**stage
        outputs, inputs = 4 * middle, 2 * middle if stage else shape.width
        make = PreactivationBlock if shape.preactivation else Block
        self.blocks = nn.Sequential(
            *(
                make(
                    outputs if index else inputs,
                    middle,
                    outputs,
                    2 if stage and not index else 1,
                    index == 0,
                    convention,
                )
                for index in range(shape.stages[stage])
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.blocks(x)
        return result


def stages_of(shape: ResNetShape, convention: Convention) -> nn.Sequential:
    return nn.Sequential(*(Stage(shape, stage, convention) for stage in range(len(shape.stages))))


class HybridBackbone(nn.Module):
    """The ResNet of a hybrid: [B, 3, H, W] -> [B, C, H / S, W / S]."""

    def __init__(self, shape: ResNetShape) -> None:
        super().__init__()
        self.stem, self.stages = Stem(shape, HYBRID), stages_of(shape, HYBRID)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.stages(self.stem(x))
        return result


@torch.no_grad()
def init_convolutions(model: nn.Module) -> None:
    """Sets the convolutions and norms of ResNets as the authors' JAX code does, with Flax's initialisers.

    The last scale of a hybrid's block is zero, so that the block is its shortcut at first.
    """
    for module in model.modules():
        if isinstance(module, StdConv):
            lecun_normal_(module.weight)
        elif isinstance(module, Norm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, Block):
            nn.init.zeros_(module.norm3.weight)
