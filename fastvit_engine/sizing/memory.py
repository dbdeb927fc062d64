"""How many bytes a process needs to train a model: `state`, `activations`, and what passes through."""

from dataclasses import replace

from fastvit_engine.config import Config, DinoConfig, MaeConfig, MaskedPatchConfig, MocoConfig
from fastvit_engine.config.model_shape import most_visible_patches
from fastvit_engine.config.timm_model import is_timm
from fastvit_engine.models import resolve_shape
from fastvit_engine.models.timm_measure import kept_bytes
from fastvit_engine.sizing.activations import (
    activation_bytes,
    autoencoder_bytes,
    block_implementation,
    checkpointed_blocks,
    contrastive_bytes,
    frozen_activation_bytes,
    input_bytes,
    masked_patch_bytes,
    recompute_mode,
    self_distillation_bytes,
    work_bytes,
)
from fastvit_engine.sizing.convolutions import weight_bytes
from fastvit_engine.sizing.parameters import COMPUTE_BYTES, DTYPES, ParameterCounts
from fastvit_engine.sizing.state import Buckets, Memory, accumulation_bytes, reduces_in_place, state_memory

_ON_DEVICE = 2  # inputs of blocks that are offloaded and back: of the block that is computed, and of the one before


def training_memory(
    config: Config, stage: int, world_size: int, micro_batch: int, accumulates: bool, buckets: Buckets, *, on_gpu: bool
) -> Memory:
    """Of one of `world_size` processes that take `micro_batch` images at a time, several in a step if `accumulates`."""
    frozen = config.optimizer.frozen
    state = state_memory(
        ParameterCounts.of_run(config),
        config.train.precision,
        stage,
        world_size,
        offload=config.zero.offload,
        accumulate_bytes=accumulation_bytes(config, stage),
        accumulates=accumulates,
        average=config.ema.decay is not None,
        buckets=buckets,
        on_gpu=on_gpu,
        optimizer=config.optimizer,
    )
    precision = config.train.precision
    if is_timm(config.model):  # one pass for an image cannot be computed, and is measured
        kept = kept_bytes(config.model, DTYPES[precision], frozen=frozen == "backbone")
        return replace(state, activations=micro_batch * kept.activations, work=micro_batch * 3 * kept.largest)
    implementation = block_implementation(config.model, precision, on_gpu=on_gpu, packed=config.packing.on)
    if isinstance(config.pretraining, MaeConfig):
        activations = autoencoder_bytes(config, config.pretraining, implementation)
    elif isinstance(config.pretraining, DinoConfig):
        activations = self_distillation_bytes(config, config.pretraining, implementation)
    elif isinstance(config.pretraining, MocoConfig):
        activations = contrastive_bytes(config, config.pretraining, implementation)
    elif isinstance(config.pretraining, MaskedPatchConfig):
        activations = masked_patch_bytes(config, config.pretraining, implementation)
    elif frozen == "backbone":  # a forward pass, which keeps nothing but the one block that it is in
        activations = frozen_activation_bytes(config.model, precision, implementation)
    else:
        activations = activation_bytes(
            config.model,
            precision,
            implementation,
            recompute_mode(config),
            checkpointed=checkpointed_blocks(config),
            visible=most_visible_patches(config, resolve_shape(config.model)),
        )
    if config.packing.on and implementation == "reference":  # attention takes images of one size together
        shape, checkpointed = resolve_shape(config.model), checkpointed_blocks(config)
        blocks = shape.depth - checkpointed + (checkpointed > 0)  # that keep more than their input at a time
        activations += blocks * shape.tokens * shape.width * COMPUTE_BYTES[precision]
    work = work_bytes(config, implementation)
    resnet = resolve_shape(config.model).resnet
    weights = 0 if resnet is None or frozen == "backbone" else weight_bytes(resnet, COMPUTE_BYTES[precision])
    if isinstance(config.pretraining, DinoConfig) and config.pretraining.local_views:
        weights *= 2  # views of either size pass by themselves
    host = state.host
    if config.train.offload_activations:
        entering, blocks = input_bytes(config), checkpointed_blocks(config)
        activations -= max(0, blocks - _ON_DEVICE) * entering
        host += micro_batch * blocks * entering
    memory = replace(state, activations=micro_batch * activations + weights, work=micro_batch * work, host=host)
    return _captured(memory, config, stage, world_size * micro_batch) if config.train.cuda_graph else memory


def _captured(memory: Memory, config: Config, stage: int, images: int) -> Memory:
    """With the passes in CUDA graphs, whose memory is never lent: activations, and a gradient of each parameter.

    images: of all processes at a time. There are two graphs if micro-batches differ in size, or images or tokens do.
    Gradients are copied out together, before stage 2 keeps its share of each.
    """
    gradients = COMPUTE_BYTES[config.train.precision] * ParameterCounts.of_run(config).learning
    several = config.train.global_batch_size % images or config.tokens.image_sizes or config.tokens.patch_drop
    kept = (2 if several else 1) * (memory.activations + memory.work + gradients)
    copies = 0 if reduces_in_place(config, stage) else gradients
    return replace(memory, captured=kept, activations=0, work=0, update=max(memory.update, copies))
