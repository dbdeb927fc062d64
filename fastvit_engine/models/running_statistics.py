"""Batch normalisation with running statistics, as convolutional networks have it, by the samples of all processes.

The rule: in training each layer is normalised by the mean and variance of the micro-batch of *all* processes, and its
running statistics follow these. So they are the same on every process, and the same on any number of processes that
share a micro-batch. They are float32 in any precision. In evaluation they are what normalises.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from fastvit_engine.models.batch_norm import sum_of_processes

_STATISTICS = ("running_mean", "running_var")


def layers_with_statistics(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that normalise by batches and keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def statistics_of(model: nn.Module) -> frozenset[str]:
    """The names of the buffers that belong to the weights: all that are floating and in the state dict."""
    kept = model.state_dict(keep_vars=True)
    return frozenset(name for name, buffer in model.named_buffers() if name in kept and buffer.is_floating_point())


def keep_float32(layers: Iterable[nn.Module], before: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Puts running statistics back to the float32 that a conversion of the model has rounded. before: `snapshot`."""
    for layer in layers:
        for name, exact in before[id(layer)].items():
            now = getattr(layer, name)
            if now is not None and now.dtype != exact.dtype and now.is_floating_point():
                layer._buffers[name] = exact.to(now.device)


def snapshot(layers: Iterable[nn.Module]) -> dict[int, dict[str, Tensor]]:
    return {
        id(layer): {name: getattr(layer, name) for name in _STATISTICS if getattr(layer, name).dtype == torch.float32}
        for layer in layers
    }


class BatchNormOfAllProcesses(TorchFunctionMode):
    """Inside the block, every call of `F.batch_norm` follows the rule above, whatever class of layer makes it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return batch_norm(*args, **kwargs)
        return func(*args, **kwargs)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As `torch.nn.functional.batch_norm`, [B, C, ...] -> the same; in training collective, over all processes."""
    if not training or processes() == 1:
        # Kernels take input of 16 bits beside parameters and statistics of 32, but not beside a mixture of them.
        statistics, cudnn = (running_mean, running_var), torch.backends.cudnn.enabled
        return torch.batch_norm(input, _exact(weight), _exact(bias), *statistics, training, momentum, eps, cudnn)
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    axes = [axis for axis in range(x.dim()) if axis != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    numbers = _add_up(x.new_tensor([x.numel() // x.shape[1]]))  # of each channel, on all processes
    mean = sum_of_processes(x.sum(axes), _add_up) / numbers  # [C]
    centred = x - mean.view(shape)
    variance = sum_of_processes(centred.square().sum(axes), _add_up) / numbers  # [C]
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            unbiased = variance * (numbers / (numbers - 1).clamp(min=1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    normalised = centred * (variance + eps).rsqrt().view(shape)
    if weight is not None:
        normalised = normalised * weight.view(shape)
    if bias is not None:
        normalised = normalised + bias.view(shape)
    return normalised.to(input.dtype)


def _exact(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _add_up(values: Tensor) -> Tensor:
    dist.all_reduce(values)
    return values
