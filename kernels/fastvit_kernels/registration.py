"""How a Triton launch becomes a PyTorch operator: one schema, one launch, one fake implementation, one gradient.

`define` and `impl` of `torch.library.Library` cost less CPU time per call than `custom_op`, which matters to operators
of a few microseconds.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch.autograd import forward_ad

from fastvit_kernels.dispatch import INTERPRETED

NAMESPACE = "fastvit"  # another in a kernel that `hub` builds
library = torch.library.Library(NAMESPACE, "FRAGMENT")
NOTHING = nullcontext()
REFERENCE = (
    "plain PyTorch has one; run the forward pass with FASTVIT_KERNELS=reference, or inside "
    '`with fastvit_kernels.dispatch.using("reference")`'
)


def register_op(schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Defines `<NAMESPACE>::<schema>` and returns it, ready to be called.

    Args:
        schema: as in "scale(Tensor x, float factor) -> Tensor"; outputs never alias an input or each other.
        launch: allocates the outputs and starts the kernels; runs on CUDA and ROCm tensors, and on CPU tensors when
            Triton interprets.
        fake: outputs of the same shapes, dtypes and strides, without data, for torch.compile.
    """
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    @wraps(launch)
    def launch_on_host(*args: Any) -> Any:
        if forward_ad._current_level >= 0:  # a compiled graph or a direct call: `uses_triton` was not asked
            raise NotImplementedError(f"{NAMESPACE}::{name} has no forward-mode derivative: {REFERENCE}")
        return launch(*args)

    @wraps(launch)
    def launch_on_device(*args: Any) -> Any:
        with torch.cuda.device_of(
            next(arg for arg in args if isinstance(arg, torch.Tensor))
        ):  # Triton launches on the current device
            return launch_on_host(*args)

    library.impl(name, launch_on_device, "CUDA")
    if INTERPRETED:
        library.impl(name, launch_on_host, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def register_gradient(
    op: Any, backward_op: Any, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Gives `op` the gradient `backward`, which calls `backward_op`; a second derivative is refused with an error.

    Args:
        setup_context: called as (ctx, inputs, outputs) after the forward pass, inputs being those of the schema.
        backward: called as (ctx, *gradients of the outputs); returns one gradient, or None, for each input.

    Returns a function that calls `op` and gives back its first output, for operators whose others only serve the
    gradient. It takes less CPU time than `op`, as PyTorch need not look at the other outputs.
    """

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise NotImplementedError(f"{op.name()} has no second derivative: {REFERENCE}")

    implement_autograd(backward_op, lambda ctx, inputs, outputs: None, refuse)
    implement_autograd(op, setup_context, backward)
    first = with_gradient(op, setup_context, backward, only_first=True)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return op(*inputs)[0]  # as one node of the graph
        return first(*inputs)

    return call


def implement_autograd(op: Any, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """What `torch.library.register_autograd` does, in less CPU time.

    Keyword arguments and lists of tensors, which that also takes, do not occur here.
    """
    function = with_gradient(op, setup_context, backward)
    library.impl(op.name().partition("::")[2], function, "Autograd")


def with_gradient(
    op: Any,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    only_first: bool = False,
) -> Callable[..., Any]:
    """`op` as a function with this gradient, which gives back all outputs or, if there are several, `only_first`."""
    others = len(op._schema.returns) - 1 if only_first else 0
    without: tuple[None, ...] = (None,) * others  # gradients of what is not given back

    def run(ctx: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = op(*inputs)
        setup_context(ctx, inputs, outputs)
        if others:
            ctx.non_differentiable = None  # marks of what is not given back
            return outputs[0]
        return outputs

    def run_backward(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():  # create_graph=True
            return backward(ctx, *gradients, *without)
        # Unpacking may run the forward pass again (activation checkpointing), which needs PyTorch's autograd.
        unpacked = Unpacked(ctx)
        with torch._C._AutoDispatchBelowAutograd():
            return backward(unpacked, *gradients, *without)

    # made with its name, which profilers show and `grad_fn` bears
    members = {"forward": staticmethod(run), "backward": staticmethod(run_backward)}
    function_class: Any = type(op.name().replace("::", "_"), (torch.autograd.Function,), members)
    apply = function_class.apply
    if only_first:  # not inside transforms, which `uses_triton` was asked for: no need to look for them again
        apply = super(torch.autograd.Function, function_class).apply

    def function(*inputs: Any) -> Any:
        if torch.is_grad_enabled():
            for tensor in inputs:
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    return apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            outputs = op(*inputs)
            return outputs[0] if others else outputs

    return function


class Unpacked:
    """The context of a backward pass with its saved tensors unpacked, which hooks allow once."""

    saved_tensors: tuple[torch.Tensor, ...]

    def __init__(self, ctx: Any) -> None:
        self.__dict__.update(ctx=ctx, saved_tensors=ctx.saved_tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.ctx, name, value)


def register_composite(
    schema: str, function: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Any:
    """Defines an operator that is written with PyTorch's own, for every device, with a gradient; ready to be called."""
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", function, lib=library)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    implement_autograd(op, setup_context, backward)
    return op


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. `triton.cdiv` also serves kernels, and takes longer."""
    return -(-a // b)


def no_autocast(device: torch.device) -> AbstractContextManager:
    """For the inside of an operator: its operands have their dtypes by now, and products must not cast them again."""
    nowhere = not torch._C._is_any_autocast_enabled()  # as a rule, and quicker to see
    if nowhere or device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return NOTHING
    return torch.autocast(device.type, enabled=False)
