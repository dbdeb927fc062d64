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
) -> None:
    """Gives `op` the gradient `backward`, which calls `backward_op`; a second derivative is refused with an error."""

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise NotImplementedError(f"{op.name()} has no second derivative: {REFERENCE}")

    torch.library.register_autograd(op.name(), backward, setup_context=setup_context, lib=library)
    torch.library.register_autograd(backward_op.name(), refuse, lib=library)


def register_composite(
    schema: str, function: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Any:
    """Defines an operator that is written with PyTorch's own, for every device, with a gradient; ready to be called."""
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", function, lib=library)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def no_autocast(device: torch.device) -> AbstractContextManager:
    """For the inside of an operator: its operands have their dtypes by now, and products must not cast them again."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
