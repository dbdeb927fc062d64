"""A whole training step, captured once in a CUDA graph and then replayed: the CPU launches one graph per step."""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # eager steps before the capture: kernels are compiled and loaded, the optimizer's state is allocated


class Captured:
    """A step on tensors of one shape, as a graph: the first calls run eagerly, the next one captures, all later replay.

    Every call is one training step, so losses are those of the eager loop. A graph repeats the same launches on the
    same memory. So the step must not wait for the GPU; what changes from step to step must be in tensors on the GPU
    (AdamW with `capturable=True`); and gradients must be None when the step begins and ends. Other shapes begin anew.

    Args:
        step: (images, labels) on the GPU -> loss, a scalar; forward pass, backward pass and update.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._step = step
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._eager_steps = 0

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        if self._inputs is None or not same_kind(self._inputs, (images, labels)):
            self._graph, self._eager_steps = None, 0  # frees the memory of the graph before
            self._inputs = images.clone(), labels.clone()
        else:
            for own, given in zip(self._inputs, (images, labels), strict=True):
                own.copy_(given)
        if self._eager_steps < WARM_UP:
            self._eager_steps += 1
            return self._on_a_side_stream(*self._inputs)
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # nothing runs while it is captured
                self._loss = self._step(*self._inputs)
            self._graph = graph
        self._graph.replay()
        return self._loss.clone()  # the next replay writes there again

    def _on_a_side_stream(self, images: Tensor, labels: Tensor) -> Tensor:
        """As PyTorch asks for steps before a capture, which runs on a stream of its own too."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            loss = self._step(images, labels)
        current.wait_stream(side)
        return loss


def same_kind(some: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor]) -> bool:
    return all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(some, others, strict=True))
