"""A stand-in for a CUDA graph, on the CPU.

It records PyTorch's operators, ours among them, and the memory that each reads and writes, and replays them there, as a
graph does with kernels. So what a graph would read is stale unless somebody copies it there, and what it has written is
lost with the next replay. Memory that a graph uses again for something else within one replay is not modelled.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fastvit_kernels.cross_entropy import op as cross_entropy
from fastvit_kernels.patch_embed import op as patch_embed

# Operators with which the host waits for the GPU: they read from it, or take values of Python's there.
WAITS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::lift_fresh",  # torch.tensor
}
REFUSED = "operation not permitted when stream is capturing"


class StandIn(TorchDispatchMode):
    """For torch.cuda.CUDAGraph. A capture changes nothing: its operators run, but memory and generator are put back."""

    def __init__(self) -> None:
        super().__init__()
        self._operators: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: set[int] = set()  # memory that the capture has allocated
        self.replays = 0

    def pool(self) -> None:
        """Of memory; there is none here."""

    def __enter__(self) -> "StandIn":
        self._generator = torch.get_rng_state()
        super().__enter__()
        return self

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if op._schema.name in WAITS:
            raise RuntimeError(REFUSED)
        for argument, given in zip(op._schema.arguments, arguments, strict=False):
            if argument.is_write:
                for tensor in tree_iter(given):
                    if memory(tensor) not in self._own:
                        self._before.setdefault(id(tensor), (tensor, tensor.clone()))
        result = op(*arguments, **(options or {}))
        outputs = [tensor for tensor in tree_iter(result) if isinstance(tensor, Tensor)]
        given = {memory(tensor) for tensor in tree_iter((arguments, options)) if isinstance(tensor, Tensor)}
        self._own |= {memory(tensor) for tensor in outputs} - given
        self._operators.append((op, arguments, options or {}, outputs))
        return result

    @torch.no_grad()
    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for tensor, copy in self._before.values():
            tensor.copy_(copy)
        torch.set_rng_state(self._generator)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for op, arguments, options, outputs in self._operators:
            again = [tensor for tensor in tree_iter(op(*arguments, **options)) if isinstance(tensor, Tensor)]
            for own, new in zip(outputs, again, strict=True):
                if own.data_ptr() != new.data_ptr():
                    own.copy_(new)


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    """The graphs that are captured in place of CUDA's."""
    made: list[StandIn] = []
    under_way: list[StandIn] = []

    @contextmanager
    def capture(graph: StandIn, **how: Any) -> Iterator[None]:
        under_way.append(graph)
        try:
            with graph:
                yield
        finally:
            under_way.remove(graph)
        made.append(graph)

    def synchronize(device: Any = None) -> None:
        if under_way:
            raise RuntimeError(REFUSED)

    class Stream:
        def wait_stream(self, other: Any) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    # of what is on the CPU alone: they read it
    monkeypatch.setattr(cross_entropy, "check_labels", lambda *_: None)
    monkeypatch.setattr(patch_embed, "check_indices", lambda *_: None)
    return made
