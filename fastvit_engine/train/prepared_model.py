"""What a configuration makes of a model before an engine wraps it."""

import torch

from fastvit_engine.config import Config
from fastvit_engine.models import AnyModel, TimmModel, VisionTransformer
from fastvit_engine.models.cuda_graph import capture_passes
from fastvit_engine.models.fp8 import Fp8Layers
from fastvit_engine.sizing.activations import checkpointed_blocks, recompute_mode
from fastvit_engine.sizing.parameters import DTYPES


def prepare_model(model: AnyModel, config: Config, device: torch.device) -> Fp8Layers | None:
    """Freezes, and says what is kept, computed in FP8, compiled and captured; returns the layers in FP8, if any.

    config: without open ends.
    """
    if config.optimizer.frozen == "backbone":
        model.freeze_backbone()
    model.recompute(recompute_mode(config))
    if isinstance(model, VisionTransformer):
        model.checkpoint_blocks(checkpointed_blocks(config), offload=config.train.offload_activations)
    in_fp8 = None
    if config.train.precision == "fp8":
        assert isinstance(model, VisionTransformer)  # others are refused
        in_fp8 = Fp8Layers(model, config, device)
    if config.train.compile:
        model.compile()
    if config.train.cuda_graph:
        capture_passes(model, lambda: in_fp8.layers_in_use if in_fp8 else None)
    if isinstance(model, TimmModel):
        model.round_buffers(DTYPES[config.train.precision])
    return in_fp8
