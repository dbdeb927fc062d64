"""What a model costs, counted from its shape: profilers that patch PyTorch functions do not see custom kernels."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from fastvit_engine.config import Config, DinoConfig, MaeConfig, MaskedPatchConfig, MocoConfig, ModelConfig
from fastvit_engine.config.fp8 import blocks_in_fp8, layer_sizes, layers_in_fp8
from fastvit_engine.config.model_shape import (
    Shape,
    drop_path_rates,
    masked_count,
    predicted_numbers,
    resolve_shape,
    visible_patches,
)
from fastvit_engine.config.phases import Phase
from fastvit_engine.config.timm_model import is_timm
from fastvit_engine.models import timm_measure
from fastvit_engine.models.masked_autoencoder import MLP_RATIO
from fastvit_kernels.residual import kept_samples


class RunFlops(NamedTuple):
    """Floating-point operations that a run takes for one image, forward and backward."""

    whole: int  # of the whole model, as papers count it
    computed: int  # of what is computed: what speed and utilisation are counted in


def run_flops(config: Config, phase: Phase | None = None, *, micro_batches: Sequence[int] | None = None) -> RunFlops:
    """Of the model with what the run's objective adds to it, for the patches that the objective shows to it.

    phase: of the run; default: whole images of the model's size. micro_batches: images in each forward pass of a step,
    over all processes, which say how many of them `drop_path_mode = subset` computes; default: as its rates say. With
    section packing, the mean over the numbers of patches that are drawn: at most, as grids are rounded down.

    Those of a model of timm are counted by PyTorch while it computes, see `timm_measure`.
    """
    model, pretraining, frozen = config.model, config.pretraining, config.optimizer.frozen
    if is_timm(model):
        flops = timm_measure.training_flops(model, frozen=frozen)
        return RunFlops(flops, flops)
    if isinstance(pretraining, MaeConfig):
        return RunFlops(
            6 * autoencoder_macs(model, pretraining),
            6 * autoencoder_macs(model, pretraining, computed=True, micro_batches=micro_batches),
        )
    if isinstance(pretraining, MaskedPatchConfig):
        shape = resolve_shape(model)
        decoder = masked_count(shape.patches, pretraining.ratio) * shape.width * predicted_numbers(shape, pretraining)
        computed = computed_macs(model, micro_batches=micro_batches, every_token=True)  # of every block
        return RunFlops(6 * (forward_macs(model) + decoder), 6 * (computed + decoder))
    if isinstance(pretraining, DinoConfig):
        return RunFlops(
            self_distillation_flops(model, pretraining),
            self_distillation_flops(model, pretraining, computed=True, micro_batches=micro_batches),
        )
    if isinstance(pretraining, MocoConfig):
        return RunFlops(
            contrastive_flops(config, pretraining),
            contrastive_flops(config, pretraining, computed=True, micro_batches=micro_batches),
        )
    if config.packing.max_patches is not None:
        most, least = config.packing.max_patches, config.packing.min_patches or config.packing.max_patches
        counts = range(least, most + 1)
        whole = sum(_training_flops(forward_macs(model, count), model, frozen) for count in counts)
        computed = sum(packed_flops(config, count) for count in counts)
        return RunFlops(whole // len(counts), computed // len(counts))
    visible = None
    if phase is not None:
        model = model.model_copy(update={"image_size": phase.image_size})
        visible = visible_patches(resolve_shape(model).patches, phase.patch_drop)
    return RunFlops(
        _training_flops(forward_macs(model, visible), model, frozen),
        _training_flops(
            computed_macs(model, visible, micro_batches=micro_batches, training=frozen == "none"), model, frozen
        ),
    )


def fp8_flops_share(config: Config) -> float:
    """The share of a step's operations that `train.precision: fp8` computes in FP8: three products of each layer in it.

    As the whole model counts; with a class token, what the last block computes for it alone is left out.
    """
    if config.train.precision != "fp8" or is_timm(config.model):
        return 0.0
    shape = resolve_shape(config.model)
    sizes, layers = layer_sizes(shape), layers_in_fp8(config, shape)
    of_block = sum(outputs * inputs for outputs, inputs in (sizes[name] for name in layers))
    blocks = list(blocks_in_fp8(config.train.fp8, shape.depth))
    macs = len(blocks) * shape.tokens * of_block
    if config.model.pool == "cls" and shape.depth - 1 in blocks:  # of the last block, keys and values are of all tokens
        whole = 2 * shape.width**2 if "qkv" in layers else 0
        macs -= (shape.tokens - 1) * (of_block - whole)
    return min(1.0, macs / computed_macs(config.model))


def packed_flops(config: Config, patches: int) -> int:
    """As `computed_flops`, of an image with so many patches: with section packing, images have different numbers."""
    return _training_flops(computed_macs(config.model, patches), config.model, config.optimizer.frozen)


def forward_macs(config: ModelConfig, visible: int | None = None) -> int:
    """Multiply-accumulates of the whole model for one image, forward, matrix products only (1 MAC = 2 FLOPs).

    The figure that papers and profilers give of a Vision Transformer: every block is counted for every token.
    Elementwise work, softmax and normalisation are left out, as is usual (Kaplan et al. 2020, section 2.1); so are, of
    a ResNet, pooling and the standardisation of weights. visible: patches that the Transformer sees; default: all.
    """
    shape = resolve_shape(config)
    width = shape.width
    if shape.resnet is not None and not shape.is_transformer:
        return shape.resnet.macs(config.image_size) + width * config.num_classes
    patches = shape.patches if visible is None else visible
    hidden = width**2 if config.head == "mlp" else 0
    pooling = _attention_pool_macs(shape, patches) if config.pool == "map" else 0
    relative = config.pos_embed == "relative"
    blocks = shape.depth * _block_macs(shape.prefix + patches, width, shape.mlp_dim, relative=relative)
    stem = 0 if shape.resnet is None else shape.resnet.macs(config.image_size)
    return stem + _patch_macs(shape, patches) + blocks + pooling + hidden + width * config.num_classes


def computed_macs(
    config: ModelConfig,
    visible: int | None = None,
    *,
    micro_batches: Sequence[int] | None = None,
    training: bool = True,
    every_token: bool = False,
) -> int:
    """As `forward_macs`, of what `VisionTransformer` computes: with a class token, the last block is for it alone.

    The block still has keys and values of all tokens; queries, attention, output projection and MLP are of one. With
    model.drop_path_mode = subset, a block computes a part of the images in training, see `run_flops`. every_token: also
    in the last block.
    """
    shape = resolve_shape(config)
    if not shape.is_transformer:
        return forward_macs(config)
    tokens = shape.prefix + (shape.patches if visible is None else visible)
    block = partial(_block_macs, tokens, shape.width, shape.mlp_dim, relative=config.pos_embed == "relative")
    costs = [block()] * shape.depth
    if config.pool == "cls" and not every_token:
        costs[-1] = block(outputs=1)
    if training and config.drop_path_mode == "subset":
        shares = [_computed_share(rate, micro_batches) for rate in drop_path_rates(config, shape)]
        costs = [round(cost * share) for cost, share in zip(costs, shares, strict=True)]
    return forward_macs(config, visible) - shape.depth * block() + sum(costs)


def _computed_share(drop_path: float, micro_batches: Sequence[int] | None) -> float:
    """The share of the images that a block computes under model.drop_path_mode = subset."""
    if micro_batches is None or drop_path == 0:
        return 1 - drop_path
    return sum(kept_samples(images, drop_path) for images in micro_batches if images) / sum(micro_batches)


def autoencoder_macs(
    config: ModelConfig, mae: MaeConfig, *, computed: bool = False, micro_batches: Sequence[int] | None = None
) -> int:
    """As `forward_macs`, of a masked autoencoder: the encoder of the visible patches, and the decoder of all.

    computed: of what `MaskedAutoencoder` computes. Its decoder ends with the masked patches alone.
    """
    shape, width = resolve_shape(config), mae.decoder_width
    masked = masked_count(shape.patches, mae.mask_ratio)
    visible = shape.patches - masked
    seen = shape.prefix + visible
    if computed:
        encoder = computed_macs(config, visible, micro_batches=micro_batches, every_token=True)
    else:
        encoder = forward_macs(config, visible)
    predicted = masked if computed else shape.patches
    decoder_block = _block_macs(shape.tokens, width, MLP_RATIO * width)
    last = _block_macs(shape.tokens, width, MLP_RATIO * width, outputs=masked) if computed else decoder_block
    decoder = seen * shape.width * width + (mae.decoder_depth - 1) * decoder_block + last
    return encoder + decoder + predicted * width * 3 * shape.patch_size**2


def self_distillation_flops(
    model: ModelConfig, dino: DinoConfig, *, computed: bool = False, micro_batches: Sequence[int] | None = None
) -> int:
    """Of all views of an image: the student's passes forward and backward, and the teacher's of the large ones."""
    width, hidden = resolve_shape(model).width, dino.projection_width
    projection = width * hidden + hidden**2 + hidden * dino.bottleneck + dino.bottleneck * dino.prototypes
    student, teacher = _student_and_teacher(computed, micro_batches)
    large = student(model, 2) + projection
    small_model = model.model_copy(update={"image_size": dino.local_size})
    small = student(small_model, dino.local_views) + projection if dino.local_views else 0
    return 6 * (2 * large + dino.local_views * small) + 2 * 2 * (teacher(model) + projection)


def contrastive_flops(
    config: Config, moco: MocoConfig, *, computed: bool = False, micro_batches: Sequence[int] | None = None
) -> int:
    """Of both views of an image: the student's passes forward and backward, the teacher's, and the comparison of keys.

    Keys have no gradient, nor have patches that are frozen.
    """
    shape, hidden, outputs = resolve_shape(config.model), moco.hidden_width, moco.outputs
    student, teacher = _student_and_teacher(computed, micro_batches)
    projection = shape.width * hidden + hidden**2 + hidden * outputs
    learned = 6 * (student(config.model, 2) + projection + 2 * outputs * hidden)
    if moco.frozen_patches:
        learned -= 4 * _patch_macs(shape, shape.patches)
    keys = 2 * (teacher(config.model) + projection)
    return 2 * (learned + keys + 4 * config.train.global_batch_size * outputs)


def _student_and_teacher(
    computed: bool, micro_batches: Sequence[int] | None
) -> tuple[Callable[[ModelConfig, int], int], Callable[[ModelConfig], int]]:
    """The MACs of a model that learns, of so many views of each image at a time, and of one that does not."""
    if not computed:
        return lambda model, views: forward_macs(model), forward_macs

    def student(model: ModelConfig, views: int) -> int:
        at_a_time = None if micro_batches is None else [views * images for images in micro_batches]
        return computed_macs(model, micro_batches=at_a_time)

    return student, partial(computed_macs, training=False)


def _patch_macs(shape: Shape, patches: int) -> int:
    """Of the projection of patches: of pixels or, in a hybrid, of what its ResNet gives."""
    return patches * math.prod(shape.patch_inputs) * shape.width


def _block_macs(tokens: int, width: int, mlp_dim: int, outputs: int | None = None, *, relative: bool = False) -> int:
    """Of one block over `tokens`, which computes `outputs` of them (default: all) from the keys and values of all.

    relative: with the products of queries and the vectors of all distances that there are.
    """
    outputs = tokens if outputs is None else outputs
    keys = tokens * 2 * width**2  # and values
    of_output = 2 * width**2 + 2 * tokens * width + 2 * width * mlp_dim  # query and output projection, attention, MLP
    distances = (tokens + outputs - 1) * width if relative else 0
    return keys + outputs * (of_output + distances)


def _attention_pool_macs(shape: Shape, patches: int) -> int:
    """Of one query that attends to so many patches, and of the MLP behind it."""
    width = shape.width
    projections = 2 * width**2 + patches * 2 * width**2  # query and output; keys and values
    return projections + 2 * patches * width + 2 * width * shape.mlp_dim


def training_flops(config: ModelConfig, *, frozen: str = "none") -> int:
    """Floating-point operations of the whole model in training, for one image: 6 x MACs, see `forward_macs`.

    Two operations a MAC, and a backward pass of twice the forward (gradients of inputs and of weights). With the
    epochs and images of pretraining this gives the exaFLOPs of Dosovitskiy et al. 2021, Table 6. A frozen backbone (see
    `optimizer.frozen`) has a forward pass only, and the head below it no gradient of its inputs.
    """
    return _training_flops(forward_macs(config), config, frozen)


def computed_flops(config: ModelConfig, *, frozen: str = "none") -> int:
    """As `training_flops`, of what is computed, see `computed_macs`: what speed and utilisation are counted in."""
    return _training_flops(computed_macs(config, training=frozen == "none"), config, frozen)


def recomputed_flops(tokens: int, config: ModelConfig, blocks: int) -> int:
    """What activation checkpointing of some blocks computes a second time, for an image of so many tokens."""
    if blocks == 0:
        return 0
    shape = resolve_shape(config)
    return 2 * blocks * _block_macs(tokens, shape.width, shape.mlp_dim, relative=config.pos_embed == "relative")


def _training_flops(macs: int, config: ModelConfig, frozen: str) -> int:
    if frozen == "none":
        return 6 * macs
    head = resolve_shape(config).width * config.num_classes
    return 2 * macs + 2 * head
