"""Activation checkpointing: a block keeps its input alone, and the backward pass computes the rest again.

The input may wait in host memory (`offload`), which takes as much of the device as two blocks need.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastvit_kernels import FusedBlock


@dataclass
class Checkpointing:
    """Which blocks of a row are checkpointed: the first ones.

    Their backward passes come last, when what the others have kept is gone. So what the backward pass of one block
    computes again needs memory that is free by then.
    """

    blocks: int = 0  # that keep their input alone
    offload: bool = False  # keeps it in host memory
    _before: "HostCopy | None" = field(default=None, repr=False)

    def __call__(self, index: int, block: nn.Module, x: Tensor, outputs: int | None = None, **how: Any) -> Tensor:
        """What block number `index` makes of x [B, N, D], as block(x, outputs=outputs, **how) does."""
        how |= {} if outputs is None else {"outputs": outputs}
        run = partial(block, **how) if how else block
        if index >= self.blocks or not torch.is_grad_enabled():
            return run(x)
        if not x.requires_grad:  # no backward pass would come here
            x = x.detach().requires_grad_()
        draws = block.training and (not isinstance(block, FusedBlock) or block.dropout > 0 or block.drop_path > 0)
        # Reentrant: the block is called again as a whole, with its hooks, and then asked for its gradients, as ZeRO-3
        # needs it. The other kind asks the first call for them, whose weights the hooks of the second have given back.
        with self._saving(index):
            result: Tensor = checkpoint(run, x, use_reentrant=True, preserve_rng_state=draws)
        return result

    def _saving(self, index: int) -> AbstractContextManager:
        """Inside, what is saved for the backward pass, which is the input of the block, goes where it shall wait."""
        if not self.offload:
            return nullcontext()

        def pack(x: Tensor) -> HostCopy:
            copy = HostCopy(x, before=self._before)
            self._before = copy if index + 1 < self.blocks else None
            return copy

        return torch.autograd.graph.saved_tensors_hooks(pack, HostCopy.load)


class HostCopy:
    """A tensor in host memory, on its way there and back while the device computes.

    before: the copy that will be asked for after this one, whose way back begins when this one is asked for.
    """

    def __init__(self, tensor: Tensor, before: "HostCopy | None" = None) -> None:
        self._device, self._before = tensor.device, before
        self._back: Tensor | None = None
        source = tensor.detach()
        if tensor.device.type != "cuda":
            self._copy = source.clone()
            return
        stream = _copy_stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self._copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self._copy.copy_(source, non_blocking=True)
        source.record_stream(stream)  # its memory is not used again before it has been copied

    def load(self) -> Tensor:
        """The tensor on its device, without gradient."""
        self._begin()
        if self._before is not None:
            self._before._begin()
        back, self._back = self._back, None
        assert back is not None
        if self._device.type == "cuda":
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(_copy_stream(self._device))
            back.record_stream(current)
        return back

    def _begin(self) -> None:
        """Begins the way back, if it has not begun."""
        if self._back is not None:
            return
        if self._device.type != "cuda":
            self._back = self._copy.clone()
            return
        with torch.cuda.stream(_copy_stream(self._device)):
            self._back = self._copy.to(self._device, non_blocking=True)


@lru_cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
