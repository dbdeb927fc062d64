"""What a block is asked to compute in FP8, and what it can."""

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor

from fastvit_kernels.fp8_scales.scales import E4M3, E5M2

Scaling = Literal["tensor", "row"]
LAYERS = ("qkv", "proj", "fc1", "fc2")  # of a block
MULTIPLE = 16  # that both sizes of a weight must be of: cuBLAS reads 16 bytes at a time


class Fp8:
    """Which linear layers of one block compute their products in FP8, and how their operands are scaled.

    scaling: "tensor", one scale per matrix, or "row", one per row of the operands of a product.
    layers: some of `LAYERS`.

    `overflows`, int32 [4] on the device, has a number above 0 for each layer that has met a scale that is out of range
    since it was last set to 0, see `scales.py`. Kernels write it, and nobody waits for it.
    """

    def __init__(self, scaling: Scaling = "tensor", layers: Iterable[str] = LAYERS) -> None:
        if scaling not in get_args(Scaling):
            raise ValueError(f"scaling must be one of {', '.join(get_args(Scaling))}, got {scaling!r}")
        asked = frozenset(layers)
        if unknown := sorted(asked - set(LAYERS)):
            raise ValueError(f"layers must be of {', '.join(LAYERS)}, got {', '.join(unknown)}")
        self.scaling: Scaling = scaling
        self.layers = asked
        self.overflows: Tensor | None = None

    def __repr__(self) -> str:
        return f"Fp8({self.scaling}, {'+'.join(layer for layer in LAYERS if layer in self.layers) or 'none'})"

    def __deepcopy__(self, memo: object) -> "Fp8":
        return Fp8(self.scaling, self.layers)

    def overflows_on(self, device: torch.device) -> Tensor:
        """`overflows`, made at the first call."""
        if self.overflows is None or self.overflows.device != device:
            self.overflows = torch.zeros(len(LAYERS), dtype=torch.int32, device=device)
        return self.overflows

    @property
    def gradient_format(self) -> torch.dtype:
        """E5M2 has the range that one scale for a whole gradient needs; with a scale per row, E4M3 is more accurate."""
        return E5M2 if self.scaling == "tensor" else E4M3


def fits(weight: torch.Size | tuple[int, ...]) -> bool:
    """Whether a layer with a weight of this shape, [out, in], can compute in FP8."""
    return all(size > 0 and size % MULTIPLE == 0 for size in weight)


def obstacle(device: torch.device) -> str | None:
    """Why this device has no FP8 matrix products that training can use, as the end of a sentence; None if it has."""
    if device.type != "cuda":
        return f"{device.type} has no FP8 matrix products"
    if torch.version.hip:
        return "AMD GPUs have other FP8 formats"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (9, 0):
        name = torch.cuda.get_device_name(device)
        return f"{name} (compute capability {major}.{minor}) is older than Hopper, which is 9.0"
    return None
