"""The groups that an optimizer's parameters come in: what is decayed, how fast each layer learns."""

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from fastvit_engine.config import OptimizerConfig

ParameterGroups = list[dict[str, Any]]
# Keys of a group besides PyTorch's.
RATE_SCALE = "learning_rate_scale"  # what the learning rate of a step is multiplied by
MATRICES = "matrices"  # whether its parameters are those that weight decay is for
APART = "apart"  # whether the optimizer keeps other state for its parameters than for the rest
_OF_EMBEDDING = re.compile(r"(cls_token|reg_token|mask_token|pos_embed|patch_embed)")
_OF_BLOCK = re.compile(r"blocks\.(\d+)\.")

# Of a parameter's name and shape: whether it belongs into a group that is APART.
Apart = Callable[[str, tuple[int, ...]], bool]


def none_apart(name: str, shape: tuple[int, ...]) -> bool:
    return False


def parameter_groups(model: nn.Module, settings: OptimizerConfig, apart: Apart = none_apart) -> ParameterGroups:
    """Groups of the parameters that learn, by weight decay, by `apart` and, under layer_decay, by layer.

    Decays the matrices of dense layers and the patch projection, as the paper's code does, and the classifier's by
    head_weight_decay: that of `head`, or of what a model lists in `of_classifier`. Biases, LayerNorm, LayerScale,
    position embedding and class token are not decayed.
    """
    of_classifier = getattr(model, "of_classifier", ("head.weight",))
    learning = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    layers = _layers(model, settings)
    last = 1 + max((layer for name, _ in learning if (layer := layers(name)) is not None), default=0)
    groups: dict[tuple[int, bool, bool, float], dict[str, Any]] = {}
    of_head = settings.weight_decay if settings.head_weight_decay is None else settings.head_weight_decay
    for name, parameter in learning:
        layer = layers(name)
        distance = 0 if settings.layer_decay is None or layer is None else last - layer
        is_matrix = name.endswith(".weight") and parameter.ndim >= 2
        is_apart = apart(name, tuple(parameter.shape))
        decay = (of_head if name in of_classifier else settings.weight_decay) if is_matrix else 0.0
        group = {
            "params": [],
            "weight_decay": decay,
            RATE_SCALE: 1.0 if settings.layer_decay is None else settings.layer_decay**distance,
            MATRICES: is_matrix,
            APART: is_apart,
        }
        groups.setdefault((-distance, not is_matrix, not is_apart, decay), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def _layers(model: nn.Module, settings: OptimizerConfig) -> Callable[[str], int | None]:
    """As `_layer`, for a model that knows its layers better: a model of timm."""
    known = getattr(model, "layers_of_parameters", None)
    if settings.layer_decay is None or known is None:
        return _layer
    layers: dict[str, int] = known()
    last = max(layers.values())
    return lambda name: None if layers[name] == last else layers[name]


def _layer(name: str) -> int | None:
    """The layer of a parameter: 0 for the embeddings, 1 for the first block; None for what follows the blocks."""
    if _OF_EMBEDDING.match(name):
        return 0
    block = _OF_BLOCK.match(name)
    return None if block is None else int(block[1]) + 1
