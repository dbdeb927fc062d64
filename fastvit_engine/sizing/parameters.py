"""How many parameters the model of a run has, and the bytes of a number."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from fastvit_engine.config import Config, ModelConfig, Pretraining
from fastvit_engine.errors import UserError
from fastvit_engine.models.convolutions import Block, PreactivationBlock
from fastvit_engine.models.image_model import ImageModel
from fastvit_engine.models.pretraining import shapes_for_training
from fastvit_engine.models.timm_library import classifier_parameters
from fastvit_engine.models.timm_measure import largest_unit
from fastvit_engine.models.vit import VisionTransformer

COMPUTE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}  # fp8: of all that is not in FP8

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


@dataclass(frozen=True)
class ParameterCounts:
    """How many parameters a model in training has: in all, in one block, in the largest tensor."""

    parameters: int
    block: int  # of one block of the encoder, which ZeRO-3 gathers as a whole; of a ResNet, of the largest
    largest: int  # of the largest tensor
    learning: int  # in all that learns
    largest_learning: int
    learning_shapes: tuple[tuple[str, tuple[int, ...]], ...]  # with names

    @classmethod
    def of_run(cls, config: Config) -> "ParameterCounts":
        """Of the model that a run trains."""
        return cls.of(config.model, frozen=config.optimizer.frozen, pretraining=config.pretraining)

    @staticmethod
    @lru_cache
    def of(model: ModelConfig, *, frozen: str = "none", pretraining: Pretraining | None = None) -> "ParameterCounts":
        """Counted on a model that holds no memory. frozen: as optimizer.frozen. pretraining: as Config.pretraining."""
        built = learning_model(model, frozen, pretraining)
        counts = [parameter.numel() for parameter in built.parameters()]
        shapes = tuple((name, tuple(p.shape)) for name, p in built.named_parameters() if p.requires_grad)
        if not shapes:
            raise UserError(
                f"optimizer.frozen = backbone leaves the classifier to learn, and {model.name} has none that "
                "get_classifier() returns: set optimizer.frozen=none"
            )
        learning = [math.prod(shape) for _, shape in shapes]
        block = _of_block(built) if isinstance(built, ImageModel) else largest_unit(built)
        return ParameterCounts(sum(counts), block, max(counts), sum(learning), max(learning), shapes)


@lru_cache
def learning_model(model: ModelConfig, frozen: str, pretraining: Pretraining | None) -> nn.Module:
    """The model of a run, without memory, whose parameters say whether they learn. It is shared: do not change it."""
    built = shapes_for_training(model, pretraining)
    if frozen == "backbone" and isinstance(built, ImageModel):
        built.freeze_backbone()
    elif frozen == "backbone":
        of_head = classifier_parameters(built)
        for name, parameter in built.named_parameters():
            parameter.requires_grad_(name in of_head)
    return built


def _of_block(model: ImageModel) -> int:
    blocks = [model.blocks[0]] if isinstance(model, VisionTransformer) else _bottlenecks(model)
    return max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)


def _bottlenecks(model: ImageModel) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, Block | PreactivationBlock)]
