"""Questions about a module, each answered with the reason against fusing it, or with "" when there is none.

The same answers decide what is accelerated, what the table says, and, at each call, whether the fused path may run.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastvit_kernels import transforms
from fastvit_kernels.integrations.fused import base_class
from fastvit_kernels.mlp import Activation

PLAIN_TENSORS = (Tensor, nn.Parameter)  # not: sharded, quantised or otherwise special subclasses
NOT_FOR_ATTENTION = ("output_hidden_states", "return_dict", "use_cache", "num_items_in_batch")  # of transformers


def check_type(name: str, module: Any, classes: Collection[type[nn.Module]]) -> str:
    if base_class(module) in classes:
        return ""
    return f"{name} is {base_class(module).__name__}"


def check_children(name: str, module: nn.Module, known: Collection[str]) -> str:
    """A child that is not known may take part in forward in a way that is not known either."""
    for child in module._modules:
        if child not in known:
            return f"{name} has a part {child!r} that is not known here"
    return ""


def check_forward(name: str, module: nn.Module) -> str:
    """Some tools exchange the forward of a library's class for all its instances."""
    if exchanged_forward(module):
        return f"the forward of {name} is not the one {base_class(module).__name__} was written with"
    return ""


def exchanged_forward(module: nn.Module) -> bool:
    own = base_class(module)
    return (own.forward.__module__, own.forward.__qualname__) != (own.__module__, f"{own.__qualname__}.forward")


def check_identity(name: str, module: nn.Module) -> str:
    return check_type(name, module, (nn.Identity,))


def check_linear(name: str, linear: Any, inputs: int, outputs: int) -> str:
    if reason := check_type(name, linear, (nn.Linear,)):
        return reason
    if (linear.in_features, linear.out_features) != (inputs, outputs):
        return f"{name} maps {linear.in_features} to {linear.out_features} features, not {inputs} to {outputs}"
    return check_tensor(f"{name}.weight", linear.weight)


def check_layer_norm(name: str, norm: Any, classes: Collection[type[nn.Module]]) -> str:
    if reason := check_type(name, norm, classes):
        return reason
    if len(norm.normalized_shape) != 1:
        return f"{name} normalises over more than the last dimension"
    if norm.weight is None or norm.bias is None:
        return f"{name} lacks a weight or a bias"
    if getattr(norm, "_fast_norm", False):
        return f"{name} was built with timm's fast norm, which computes in another precision"
    return check_tensor(f"{name}.weight", norm.weight)


def check_tensor(name: str, tensor: Tensor) -> str:
    return "" if type(tensor) in PLAIN_TENSORS else f"{name} is a {type(tensor).__name__}"


def check_precision(norm: nn.Module, scale: Tensor | None, weight: Tensor) -> str:
    """LayerNorm parameters may be float32 beside narrower weights; a wider scale would widen the residual stream."""
    if norm.weight.dtype not in (weight.dtype, torch.float32):
        return f"LayerNorm weights are {norm.weight.dtype}, the others {weight.dtype}"
    if scale is not None and scale.dtype != weight.dtype:
        return f"the layer scale is {scale.dtype}, the weights are {weight.dtype}"
    return ""


def check_hooks(modules: Mapping[str, nn.Module | None], but_forward: bool = False) -> str:
    """The fused path does not call these modules, so whatever is attached to their calls would not happen.

    With `but_forward`, forward hooks have been looked at already.
    """
    if torch_module._has_any_global_hook():
        return "a hook on all modules is registered"
    for name, module in modules.items():
        if module is None:
            continue
        if module._forward_hooks and not but_forward:
            return f"{name} has a hook"
        if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"{name} has a hook"
        if "forward" in module.__dict__ and getattr(module.forward, "__func__", None) is not type(module).forward:
            return f"{name} has a forward of its own"
    return ""


def check_rate(name: str, rate: float) -> str:
    return "" if 0 <= rate < 1 else f"{name} has rate {rate}"


def in_force(rate: float, module: nn.Module, training: bool | None) -> float:
    """The rate at which `module` drops in its present mode, or in the given one."""
    return rate if (module.training if training is None else training) else 0.0


def dropout_rate(dropout: Any, training: bool | None) -> float:
    """Of a Dropout (`p`), a DropPath (`drop_prob`), or an Identity in the place of either."""
    if isinstance(dropout, nn.Identity):
        return 0.0
    return in_force(dropout.p if isinstance(dropout, nn.Dropout) else dropout.drop_prob, dropout, training)


def activation_name(module: nn.Module, names: Mapping[type[nn.Module], Activation]) -> Activation | None:
    """`names` are the library's own GELU classes; None is an activation that `layer_norm_mlp` does not have."""
    if base_class(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return names.get(base_class(module))


def asks(kwargs: dict[str, Any]) -> bool:
    """Whether an option of transformers may concern attention: is_causal, output_attentions, a packed sequence."""
    return any(
        value is not None and value is not False and name not in NOT_FOR_ATTENTION for name, value in kwargs.items()
    )


def fits(x: Any, weight: Tensor) -> bool:
    """Whether x is what the operations take.

    Under autocast that is float32: there they do as the library does, products in the narrow dtype beside a residual
    stream in float32. For another input autocast widens some results, and the operations keep the dtype of x. Under
    torch.func and forward-mode differentiation the library's own code runs, which supports what it always did.
    """
    return (
        type(x) in PLAIN_TENSORS
        and x.dtype == weight.dtype
        and x.is_floating_point()
        and x.device == weight.device
        and not x.is_nested
        and (x.dtype == torch.float32 or not autocasts(x.device.type))
        and transforms.obstacle() is None
    )


def autocasts(device_type: str) -> bool:
    # The meta device knows no autocast and refuses the question. torch.amp.is_autocast_available would tell, but
    # torch.compile of PyTorch 2.11 cannot trace it.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)
