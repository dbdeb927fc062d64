"""The forward and backward pass of a model in training as CUDA graphs: two launches in place of hundreds.

A graph repeats the same kernels on the same memory. So inputs are copied to where the captured pass has read them, and
the output and the gradients are copied from where it has written them. Gradients then go the way of all gradients,
through PyTorch's accumulation and the hooks of the engine. Random numbers are those of eager passes: a replay takes
seed and offset of the GPU's generator as they are, and moves the offset on.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from fastvit_engine.errors import UserError

WARM_UP = 3  # passes of a kind that run eagerly, which compiles and loads its kernels
MOST = 2  # kinds that have graphs at a time: micro-batches of a process have two sizes at the most
UNUSED = 100  # passes of other kinds, after which a graph gives its memory to another kind
_MOST_COUNTED = 100  # kinds of eager passes
_ERRORS = "thread_local"  # other threads may allocate meanwhile: those of data loading, of saving, of NCCL
_PLAIN = (bool, int, float, str, type(None))


def capture_passes(model: nn.Module, decided_by: Callable[[], Hashable] = lambda: None) -> None:
    """From now on `model` captures its passes in training, once it is called a few times with tensors of some shapes.

    decided_by: what else decides which kernels run. If it changes, graphs are captured anew, as if weights have moved.
    """
    model.forward = CapturedForward(model, decided_by)


class CapturedForward:
    """In place of a model's `forward`. Evaluation, and passes without gradients, run as before.

    Passes of a kind without a graph run eagerly: the first ones, those of a third kind, and a second one before the
    backward pass of the first. A kind is what a pass is given: shapes, layouts and types of tensors, and plain values.
    """

    def __init__(self, model: nn.Module, decided_by: Callable[[], Hashable]) -> None:
        self._model, self._forward, self._decided_by = model, model.forward, decided_by
        self.captured: dict[Hashable, Passes] = {}
        self._eager = Counter[Hashable]()
        self._captured_in: Hashable = None
        self._passes, self._capturing = 0, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._capturing or not self._model.training or not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        passes = self._passes_of(args, kwargs)
        return self._forward(*args, **kwargs) if passes is None else passes(args, kwargs)

    def _passes_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "Passes | None":
        """The graphs for such a pass, captured now if it is time; None: it is to run eagerly."""
        self._passes += 1
        if (state := self._state()) != self._captured_in:
            self.captured.clear()
            self._eager.clear()
            self._captured_in = state
        kind = (*map(_kind, args), *((name, _kind(value)) for name, value in kwargs.items()))
        passes = self.captured.get(kind)
        if passes is None:
            if len(self._eager) > _MOST_COUNTED:
                self._eager.clear()
            self._eager[kind] += 1
            if self._eager[kind] <= WARM_UP or not self._has_room():
                return None
            passes = self.captured[kind] = self._capture(args, kwargs)
        passes.used = self._passes
        return None if passes.in_flight else passes

    def _state(self) -> Hashable:
        """What graphs rely on besides what a pass is given: where weights are, and what decides."""
        tensors = chain(self._model.parameters(), self._model.buffers())
        return self._decided_by(), tuple(tensor.data_ptr() for tensor in tensors)

    def _has_room(self) -> bool:
        for kind in [kind for kind, passes in self.captured.items() if self._passes - passes.used > UNUSED]:
            del self.captured[kind], self._eager[kind]
        return len(self.captured) < MOST

    def _capture(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "Passes":
        self._capturing = True
        try:
            return Passes(self._model, args, kwargs)
        except RuntimeError as error:
            raise UserError(
                f"train.cuda_graph = true: the passes of {type(self._model).__name__} cannot be captured "
                f"({' '.join(str(error).split())[:300]}): set train.cuda_graph=false"
            ) from error
        finally:
            self._capturing = False


class Passes:
    """Forward and backward pass of a model for tensors of one kind, captured from it as it is now."""

    used = 0  # when it was replayed last

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        given = [value.clone() if isinstance(value, Tensor) else value for value in (*args, *kwargs.values())]
        positional, named = tuple(given[: len(args)]), dict(zip(kwargs, given[len(args) :], strict=True))
        self._inputs = [value for value in given if isinstance(value, Tensor)]
        self._learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._in_flight: weakref.ref[_Flight] | None = None
        # Stand-ins for the parameters, on the same memory: an engine's hooks hang on the parameters, and what they do
        # on the host must not be captured.
        bare = _WithoutHooks(model)
        own = {name: p.detach().requires_grad_(p.requires_grad) for name, p in bare.named_parameters()}
        learning = [parameter for parameter in own.values() if parameter.requires_grad]

        def forward() -> Tensor:
            output = functional_call(bare, own, positional, named)
            if not isinstance(output, Tensor):
                raise RuntimeError(f"it returns a {type(output).__name__}, not a tensor")
            return output

        def backward(output: Tensor, gradient: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(output, learning, gradient, allow_unused=True)

        _rehearse(forward, backward, self._learning[0].device)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forward, capture_error_mode=_ERRORS):
            output = forward()
        # Not empty memory: what it held would count as an overflow of FP8, where a stand-in computes while it captures.
        self._output, self._gradient = output.detach(), torch.zeros_like(output)
        with torch.cuda.graph(self._backward, pool=self._forward.pool(), capture_error_mode=_ERRORS):
            self._gradients = backward(output, self._gradient)

    @property
    def in_flight(self) -> bool:
        """Whether a backward pass may still come, for which the last forward pass has kept its results."""
        return self._in_flight is not None and self._in_flight() is not None

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        for own, given in zip(self._inputs, tensors, strict=True):
            own.copy_(given, non_blocking=True)
        output: Tensor = _Replay.apply(self, _Flight(), *self._learning)
        return output

    def replay_forward(self, flight: "_Flight") -> Tensor:
        self._in_flight = weakref.ref(flight)
        self._forward.replay()
        return self._output.clone()

    def replay_backward(self, flight: "_Flight", gradient: Tensor) -> list[Tensor | None]:
        """The gradients of the parameters that learn, in memory of their own.

        All are copied at once. PyTorch takes them as they are, where it would copy tensors of ours one by one.
        """
        if self._in_flight is None or self._in_flight() is not flight:
            raise RuntimeError("a captured pass has one backward pass, before the next forward pass")
        self._gradient.copy_(gradient)
        self._backward.replay()
        self._in_flight = None
        copies = [None if written is None else torch.empty_like(written) for written in self._gradients]
        there = [written for written in self._gradients if written is not None]
        torch._foreach_copy_([copy for copy in copies if copy is not None], there)
        return copies


class _WithoutHooks(nn.Module):
    """A model without the hooks around its call: those of an engine belong around each replay, and may wait."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.forward(*args, **kwargs)


class _Flight:
    """Lives as long as PyTorch may ask for the backward pass of one forward pass."""


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passes: Passes, flight: _Flight, *parameters: nn.Parameter) -> Tensor:
        ctx.passes, ctx.flight = passes, flight
        return passes.replay_forward(flight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.passes.replay_backward(ctx.flight, gradient)


def _rehearse(forward: Callable[[], Tensor], backward: Callable[[Tensor, Tensor], Any], device: torch.device) -> None:
    """Both passes once, on a stream that is not the usual one, as in a capture: for what libraries allocate there.

    Nothing comes of it, and no random numbers are used up. The gradient is as large as that of a mean: scales of FP8
    are looked at here too.
    """
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.cuda.stream(side):
        output = forward()
        backward(output, torch.full_like(output, 1 / output.numel()))
    current.wait_stream(side)


def _kind(value: Any) -> Hashable:
    """All of a value that a graph repeats. Raises UserError if it cannot tell."""
    if isinstance(value, Tensor) and not value.requires_grad:
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, _PLAIN):
        return value
    what = "a tensor that needs a gradient" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise UserError(
        f"train.cuda_graph = true: the objective gives the model {what}, and captured passes take tensors without "
        "gradients and plain values: set train.cuda_graph=false"
    )
