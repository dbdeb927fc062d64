"""RandAugment on whole batches, on the training device.

Each image passes through `num_ops` operations drawn for it alone out of those of a policy. Images that drew the same
operation are changed together, so a batch costs some fifteen small passes per layer whatever its size, on a GPU as on a
CPU.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
from torch import Tensor

from fastvit_engine.data.pixels import randaugment_big_vision, randaugment_paper
from fastvit_engine.data.pixels.draws import on_device, uniforms

MAGNITUDE_UNIT = 10  # the magnitude at which an operation has the strength that its definition says

Policy = Literal["paper", "big_vision"]
POLICIES: dict[Policy, tuple[Callable[..., Tensor], ...]] = {
    "paper": randaugment_paper.OPERATIONS,
    "big_vision": randaugment_big_vision.OPERATIONS,
}


def randaugment(
    images: Tensor, seeds: np.ndarray, *, num_ops: int, magnitude: float, policy: Policy = "paper"
) -> Tensor:
    """uint8 [B, H, W, 3] -> uint8 [B, H, W, 3].

    Args:
        seeds: int64 [B] on the host. What happens to an image depends on its pixels and its seed only.
        num_ops: operations an image passes through, one after the other (N of the paper).
        magnitude: strength of all of them (M of the paper, on its scale of 10); operations with a direction take
            either at random.
        policy: the operations and what a magnitude means to them.
    """
    operations = POLICIES[policy]
    pixels = images.permute(0, 3, 1, 2)  # [B, 3, H, W]
    strength = magnitude / MAGNITUDE_UNIT
    for layer in range(num_ops):
        draws = uniforms(seeds, 4, stream=layer)
        choices = (draws[:, 0] * len(operations)).astype(np.int64)
        directions = on_device(np.where(draws[:, 1] < 0.5, -1.0, 1.0).astype(np.float32), pixels.device)
        places = on_device(draws[:, 2:], pixels.device)  # [B, 2]
        order = np.argsort(choices, kind="stable")
        rows = on_device(order, pixels.device)
        ends = np.searchsorted(choices[order], np.arange(len(operations)), side="right")
        changed, start = pixels.clone(), 0
        for operation, end in zip(operations, ends, strict=True):
            if end > start:
                group = rows[start:end]
                place = {"place": places[group]} if operation is randaugment_big_vision.cutout else {}
                changed[group] = operation(pixels[group], strength * directions[group], **place)
            start = end
        pixels = changed
    return pixels.permute(0, 2, 3, 1).contiguous()
