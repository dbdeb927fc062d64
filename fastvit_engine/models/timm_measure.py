"""What a model of timm costs, measured on tensors that have shapes and no data: operations, and bytes kept.

Nobody has written down what its layers compute, so one step of it is watched, on the device "meta".
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from fastvit_engine.config import ModelConfig
from fastvit_engine.errors import UserError
from fastvit_engine.models.timm_library import classifier_parameters, skeleton
from fastvit_engine.shown import brief

_IMAGES = 2  # of a step: batch normalisation needs more than one


class KeptBytes(NamedTuple):
    """What a step needs beside weights, for each image."""

    activations: int  # kept for the backward pass
    largest: int  # of them, the largest tensor


@lru_cache
def forward_flops(config: ModelConfig) -> int:
    """Floating-point operations of a forward pass for one image, as PyTorch counts them.

    These are matrix products, convolutions and attention. Raises UserError if the model cannot take images of
    `model.image_size`.
    """
    model = skeleton(config).eval().requires_grad_(False)
    counter = FlopCounterMode(display=False)
    with counter:
        _forward(model, config, 1, torch.float32)
    return int(counter.get_total_flops())


def training_flops(config: ModelConfig, *, frozen: str = "none") -> int:
    """Of a training step for one image: three times the forward pass, whose backward pass takes twice as many.

    frozen: as optimizer.frozen; with backbone, the forward pass and what the classifier takes more.
    """
    if frozen == "none":
        return 3 * forward_flops(config)
    model = skeleton(config)
    head = sum(model.get_parameter(name).numel() for name in classifier_parameters(model) if name.endswith("weight"))
    return forward_flops(config) + 2 * head


@lru_cache
def kept_bytes(config: ModelConfig, dtype: torch.dtype, *, frozen: bool = False) -> KeptBytes:
    """The bytes that a forward pass in training keeps for the backward pass, and its largest tensor.

    dtype: of weights and activations. frozen: the classifier alone learns. Raises UserError as `forward_flops`.
    """
    model = skeleton(config).to(dtype).train()
    if frozen:
        learning = classifier_parameters(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in learning)
    weights = {id(parameter) for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors themselves: an id may be used again once one is gone

    def keep(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in weights:
            kept[id(base)] = base
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _forward(model, config, _IMAGES, dtype)
    sizes = [tensor.numel() * tensor.element_size() for tensor in kept.values()]
    return KeptBytes(-(-sum(sizes) // _IMAGES), -(-max(sizes, default=0) // _IMAGES))


@lru_cache
def normalises_batches(config: ModelConfig) -> bool:
    """Whether what the model makes of an image in training depends on the others of the micro-batch."""
    return any(isinstance(module, _BatchNorm) for module in skeleton(config).modules())


def largest_unit(model: nn.Module) -> int:
    """The parameters of the largest layer of a repeated kind, which ZeRO-3 has whole at a time."""
    return max((sum(p.numel() for p in unit.parameters()) for unit in _units(model)), default=0)


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the innermost lists of modules, as blocks are."""
    for child in module.children():
        inner = list(_units(child))
        if inner:
            yield from inner
        elif isinstance(module, nn.Sequential | nn.ModuleList) and next(child.parameters(), None) is not None:
            yield child


def _forward(model: nn.Module, config: ModelConfig, images: int, dtype: torch.dtype) -> Any:
    size = config.image_size
    try:
        logits = model(torch.empty(images, 3, size, size, dtype=dtype, device="meta"))
    except Exception as error:
        remedy = "set a size that it takes"
        if dtype != torch.float32:
            remedy += ", or train.precision=fp32 if it does not compute in 16 bits"
        raise UserError(
            f"{config.name} cannot compute images of model.image_size = {size} pixels ({type(error).__name__}: "
            f"{brief(error)}): {remedy}"
        ) from error
    return logits
