"""Transforms of PyTorch in which the kernels take no part: those of torch.func, and forward-mode differentiation.

The operators have a gradient for ordinary backward passes only. Under one of these transforms PyTorch would refuse them
in words of its own or, in forward mode, treat their results as constants without a word.
"""

import torch
from torch.autograd import forward_ad


def obstacle() -> str | None:
    """Why no kernel may run now, or None: the plain PyTorch of the operations supports every transform."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "the kernels have no rules for the transforms of torch.func (grad, vjp, jvp, vmap)"
    if forward_ad._current_level >= 0:
        return "the kernels have no forward-mode derivative"
    return None


# As torch.compiler.assume_constant_result does, which imports torch._dynamo, seconds of work. torch.compile asks while
# it traces, and guards what the answer depends on.
vars(obstacle)["_dynamo_marked_constant"] = True
