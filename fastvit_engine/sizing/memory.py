"""How many bytes a process needs to train a model: state under each ZeRO stage, activations, and what passes through.

The state is what DeepSpeed 0.19 allocates, part by part; a test counts its tensors. P is the number of parameters, W
the number of processes, c the bytes of a computed number (4; 2 for bf16 and fp16), a those of an accumulated gradient.
With AdamW ("others": fp16, and offloaded states):

| stage             | weights | gradients      | optimizer             |
|-------------------|---------|----------------|-----------------------|
| 0, fp32           | c P     | c P            | 8 P (Adam's moments)  |
| 0, bf16 and fp16  | c P     | c P            | 12 P (fp32 weights)   |
| 1, a = c          | c P     | c P            | 12 P / W              |
| 1, a > c, bf16    | c P     | (a + c) P      | 12 P / W              |
| 1, a > c, others  | c P     | a P            | 12 P / W              |
| 2                 | c P     | a P / W        | 12 P / W              |
| 3                 | c P / W | a P / W        | 12 P / W              |

The other optimizers keep other state than AdamW's 8 P: SGD and Lion 4 P (SGD without momentum none), Muon 4 P for the
matrices of the blocks and 8 P for the rest, LAMB 8 P, Adafactor 2 P and 4 P more for what is not factored. Parameters
that do not learn have weights and, but for stage 0 in fp32, an fp32 copy (4 P; 4 P / W from stage 1 on), and neither
gradients nor moments.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Literal

import torch
from torch import nn

from fastvit_engine.config import (
    Config,
    DinoConfig,
    MaeConfig,
    MaskedPatchConfig,
    MocoConfig,
    ModelConfig,
    OptimizerConfig,
    Pretraining,
)
from fastvit_engine.config.fp8 import layer_sizes
from fastvit_engine.config.model_shape import (
    masked_count,
    most_visible_patches,
    predicted_numbers,
    tokens_in_training,
)
from fastvit_engine.config.timm_model import is_timm
from fastvit_engine.engine.optimizers.kinds import KINDS, updates_in_place
from fastvit_engine.engine.optimizers.state import STATE_BYTES
from fastvit_engine.errors import UserError
from fastvit_engine.models import resolve_shape
from fastvit_engine.models.convolutions import Block, PreactivationBlock
from fastvit_engine.models.image_model import ImageModel
from fastvit_engine.models.masked_autoencoder import MLP_RATIO
from fastvit_engine.models.pretraining import shapes_for_training
from fastvit_engine.models.timm_library import classifier_parameters
from fastvit_engine.models.timm_measure import kept_bytes, largest_unit
from fastvit_engine.models.vit import VisionTransformer
from fastvit_engine.sizing.convolutions import convolution_bytes, passing_bytes, weight_bytes
from fastvit_kernels import dispatch
from fastvit_kernels.mlp.op import Recompute

# of a block: Triton; a composition of operations that choose for themselves, as with dropout; plain PyTorch
Implementation = Literal["fused", "composed", "reference"]
COMPUTE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}  # fp8: of all that is not in FP8
_ADAMW = OptimizerConfig()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
_ON_DEVICE = 2  # inputs of blocks that are offloaded and back: of the block that is computed, and of the one before
UNBUCKETED = 500_000_000  # elements that DeepSpeed's stage 0 reduces at a time


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


@dataclass(frozen=True)
class Buckets:
    """The sizes of DeepSpeed's buffers, in numbers."""

    reduce: int = 0
    doubled: bool = False  # by overlap_comm, under stages 1 and 2
    gathered: int = 0  # stage 3: parameters that are whole at a time, at the most
    secondary_shards: int = 1  # stage 3: zero_hpz_partition_size


@dataclass(frozen=True)
class Memory:
    """Bytes that one process needs on its device at a time, at the most."""

    weights: int
    gradients: int
    optimizer: int  # fp32 weights and moments
    average: int  # of the weights
    buffers: int  # reduction buckets, gathered parameters
    update: int  # while gradients are reduced and weights updated: passes before the next forward pass
    activations: int = 0  # of one micro-batch, kept for the backward pass
    work: int = 0  # while the backward pass goes through one block
    host: int = 0  # offloaded, in the memory of the host

    @property
    def state(self) -> int:
        """What stays, or comes back with every step."""
        return self.weights + self.gradients + self.optimizer + self.average + self.buffers

    @property
    def total(self) -> int:
        """Activations are gone when the update begins."""
        return self.state + max(self.update, self.activations + self.work)


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
    return replace(state, activations=micro_batch * activations + weights, work=micro_batch * work, host=host)


def _of_block(model: ImageModel) -> int:
    blocks = [model.blocks[0]] if isinstance(model, VisionTransformer) else _bottlenecks(model)
    return max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)


def _bottlenecks(model: ImageModel) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, Block | PreactivationBlock)]


def accumulation_bytes(config: Config, stage: int) -> int:
    """Of a gradient that is summed up over micro-batches: fp32 under ZeRO, unless the recipe says otherwise."""
    given = (config.deepspeed.get("data_types") or {}).get("grad_accum_dtype")
    if given is not None:
        return COMPUTE_BYTES.get(given, 4)
    return 4 if stage > 0 else COMPUTE_BYTES[config.train.precision]


def reduces_in_place(config: Config, stage: int) -> bool:
    """Whether all gradients are reduced at once, where they lie: without ZeRO, and by DeepSpeed's bf16 optimizer."""
    return stage == 0 or _is_bf16_optimizer(
        config.train.precision, accumulation_bytes(config, stage), stage, config.zero.offload
    )


def _is_bf16_optimizer(precision: str, accumulate_bytes: int, stage: int, offload: str) -> bool:
    """Stage 1 with fp32 sums of bf16 gradients is another class of DeepSpeed than the rest of ZeRO."""
    return stage == 1 and precision in ("bf16", "fp8") and accumulate_bytes == 4 and offload == "none"


def state_memory(
    counts: ParameterCounts,
    precision: str,
    stage: int,
    world_size: int,
    *,
    offload: str,
    accumulate_bytes: int,
    accumulates: bool,
    average: bool,
    buckets: Buckets,
    on_gpu: bool,
    optimizer: OptimizerConfig = _ADAMW,
) -> Memory:
    """All but the activations. See the table above; `update` and `buffers` are explained where they are computed."""
    compute = COMPUTE_BYTES[precision]
    total, whole = counts.parameters, counts.learning
    total_share, share = -(-total // world_size), -(-whole // world_size)
    sums_apart = accumulate_bytes != compute

    masters = 0 if stage == 0 and precision == "fp32" else 4 * (total if stage == 0 else total_share)
    kind = KINDS[optimizer.kind]
    kept = sum(STATE_BYTES[optimizer.kind](optimizer, name, shape) for name, shape in counts.learning_shapes)
    states = masters + (kept if stage == 0 else -(-kept * share // whole))
    weights = compute * (total_share if stage == 3 else total)
    own_class = _is_bf16_optimizer(precision, accumulate_bytes, stage, offload)
    if stage == 1 and sums_apart:  # all but the bf16 optimizer drop a gradient when it is added to its sum
        gradients = (accumulate_bytes + (compute if own_class else 0)) * whole
    else:
        gradients = compute * whole if stage <= 1 else accumulate_bytes * share

    in_place = stage == 0 or own_class
    once = _copies_once(stage, compute, accumulate_bytes, offload, buckets, on_gpu=on_gpu)
    if stage == 3:
        buffers = compute * (buckets.reduce + buckets.gathered)
        buffers += compute * -(-total // buckets.secondary_shards) if buckets.secondary_shards > 1 else 0
    elif in_place or (once and (stage == 1 or world_size == 1)):
        buffers = 0
    else:
        buffers = (accumulate_bytes if stage == 1 else compute) * buckets.reduce * (2 if buckets.doubled else 1)

    # The copies that reduction and update make. What is fused, on a GPU, updates in place.
    tensor, held = (counts.largest_learning, whole) if stage == 0 else (share, share)
    scratch = None if updates_in_place(optimizer, on_gpu=on_gpu) else kind.scratch_bytes
    made = 0 if scratch is None else scratch(optimizer, tensor, held)
    if stage == 0:
        flattened = compute * min(whole, UNBUCKETED) if world_size > 1 else 0
        update = max(flattened, made + (4 * whole if compute < 4 else 0))
    elif in_place:
        update = max(compute * whole, made)
    elif once:
        update = made
    else:
        copied = 4 * share if stage == 3 or not sums_apart else 0
        summand = accumulate_bytes * share if stage == 2 and accumulates and not sums_apart else 0
        update = max(made + copied, summand)

    averages = 4 * (total if stage == 0 else total_share) * average
    state = Memory(weights, gradients, states, averages, buffers, update)
    return state if offload == "none" else _offloaded(state, counts, compute, share, stage, everything=offload == "all")


def _copies_once(stage: int, compute: int, accumulate: int, offload: str, buckets: Buckets, *, on_gpu: bool) -> bool:
    """Whether a gradient is copied once, to where the optimizer reads it: see engine/deepspeed_gradients.py."""
    return not on_gpu and offload == "none" and not buckets.doubled and (stage > 1 or accumulate == compute)


def _offloaded(
    state: Memory, counts: ParameterCounts, compute: int, share: int, stage: int, *, everything: bool
) -> Memory:
    """Optimizer, average and the update's gradients in host memory; with `everything`, the sharded weights too."""
    host = state.optimizer + state.average + 4 * share  # an fp32 gradient beside each master weight
    host += compute * share if stage < 3 else 0  # the new weights on their way to the device
    kept = replace(state, optimizer=0, average=0, update=0, host=host)
    if stage < 3:
        kept = replace(kept, buffers=state.buffers + 2 * compute * counts.largest)
    return replace(kept, weights=0, host=host + state.weights) if everything else kept


def block_implementation(model: ModelConfig, precision: str, *, on_gpu: bool, packed: bool = False) -> Implementation:
    """What `fastvit_kernels` runs for a block; "reference" for a model of timm, and for a ResNet, which has none.

    packed: the images of a batch are one sequence, see section packing.
    """
    if is_timm(model) or not resolve_shape(model).is_transformer:
        return "reference"
    on = DTYPES[precision], on_gpu
    may_fuse = model.dropout == 0 and not packed
    if may_fuse and all(dispatch.plan(half, *on).runs == "triton" for half in ("attention_block", "mlp")):
        return "fused"
    return "composed" if dispatch.plan("layer_norm", *on).runs == "triton" else "reference"


def checkpointed_blocks(config: Config) -> int:
    """How many blocks keep their input alone, where the recipe does not say it: none."""
    asked = config.train.activation_checkpointing
    if asked == "all":
        return resolve_shape(config.model).depth
    return 0 if asked == "auto" else asked


def input_bytes(config: Config) -> int:
    """Of the input of a block of the encoder, for each image, or for all views of it."""
    width = resolve_shape(config.model).width
    return tokens_in_training(config) * width * COMPUTE_BYTES[config.train.precision]


def kept_by_row(blocks: Sequence[int], checkpointed: int, entering: int, later: int) -> int:
    """Bytes kept by blocks one after the other, each of which keeps `blocks`, and by what follows them, `later`.

    The first `checkpointed` keep their input, `entering`, alone. Each computes the rest again in the backward pass,
    after that of all behind it has freed what those had kept.
    """
    again = max(blocks[:checkpointed], default=0)
    return checkpointed * entering + max(sum(blocks[checkpointed:]) + later, again)


def recompute_mode(config: Config) -> Recompute:
    """What the blocks recompute, where the recipe does not say it: the GELU."""
    return "gelu" if config.train.recompute == "auto" else config.train.recompute


def block_bytes_a_token(
    width: int,
    heads: int,
    mlp_dim: int,
    compute: int,
    implementation: Implementation,
    *,
    recompute: Recompute = "gelu",
    dropout: bool = False,
) -> int:
    """Kept for the backward pass by one block, for each token.

    x, norm(x), queries, keys, values, attention's result; x, norm(x), W_1 norm(x) + b_1; float32 statistics of two
    normalisations and of each head's softmax.
    """
    statistics = 4 * heads + 16
    if implementation == "fused":
        numbers = 8 * width + mlp_dim
        numbers += {"none": mlp_dim, "gelu": 0, "all": -2 * width}[recompute]
        return compute * numbers + statistics
    # Plain PyTorch normalises a float32 copy of x.
    inputs = 2 * width * (4 if implementation == "reference" else compute)
    masks = (2 * width + mlp_dim) * (compute if implementation == "reference" else 1) if dropout else 0
    return inputs + compute * (6 * width + 2 * mlp_dim) + masks + statistics


def relative_bytes_a_token(tokens: int, width: int, heads: int, compute: int, implementation: Implementation) -> int:
    """Kept by one block beside `block_bytes_a_token` if its attention has relative positions.

    The queries once more, and their products with the vectors of all distances, which are the bias; plain PyTorch has
    the probabilities in float32 instead, and queries, keys and values too.
    """
    if implementation == "reference":
        return compute * width + 4 * heads * tokens + 3 * (4 - compute) * width
    return compute * (width + heads * (2 * tokens - 1))


def last_block_bytes_a_token(width: int, compute: int, implementation: Implementation) -> int:
    """As `block_bytes_a_token`, where the class token alone is computed: x, norm(x), keys, values and statistics."""
    return width * (4 if implementation == "reference" else compute) + compute * 3 * width + 8


def activation_bytes(
    model: ModelConfig,
    precision: str,
    implementation: Implementation,
    recompute: Recompute = "gelu",
    *,
    checkpointed: int = 0,
    every_token: bool = False,
    visible: int | None = None,
) -> int:
    """Kept for the backward pass by the whole model, for each image.

    checkpointed: as in `kept_by_row`. every_token: also in the last block. visible: patches that the model sees;
    default: all.
    """
    shape, compute = resolve_shape(model), COMPUTE_BYTES[precision]
    if not shape.is_transformer:  # beside the maps: the logits, their float32 form and gradient, and the head's input
        return pixel_bytes(model, precision, implementation) + (compute + 8) * model.num_classes + compute * shape.width
    patches = shape.patches if visible is None else visible
    tokens = shape.prefix + patches
    block = block_bytes_a_token(
        shape.width,
        shape.heads,
        shape.mlp_dim,
        compute,
        implementation,
        recompute=recompute,
        dropout=model.dropout > 0,
    )
    if model.layer_scale is not None and implementation != "fused":
        block += 2 * compute * shape.width  # what is scaled
    if model.pos_embed == "relative":
        block += relative_bytes_a_token(shape.tokens, shape.width, shape.heads, compute, implementation)
    plain = implementation == "reference"
    pixels = pixel_bytes(model, precision, implementation, share=patches / shape.patches)
    blocks, last_tokens = [tokens * block] * shape.depth, tokens
    if model.pool == "cls" and not every_token:  # the last block is for one token
        last_tokens = 1
        blocks[-1] = tokens * last_block_bytes_a_token(shape.width, compute, implementation) + block
    final = last_tokens * ((4 if plain else compute) * shape.width + 8)  # input of the last norm
    head = (compute + 8) * model.num_classes  # logits, their float32 form and gradient
    if model.pool == "map":  # the tokens, their keys and values
        final += patches * 3 * compute * shape.width
    return pixels + kept_by_row(blocks, checkpointed, tokens * compute * shape.width, final + head)


def autoencoder_bytes(config: Config, mae: MaeConfig, implementation: Implementation) -> int:
    """As `activation_bytes`, of a masked autoencoder: an encoder of few tokens, and a narrow decoder of all."""
    model, compute = config.model, COMPUTE_BYTES[config.train.precision]
    shape, recompute = resolve_shape(model), recompute_mode(config)
    masked, seen = masked_count(shape.patches, mae.mask_ratio), tokens_in_training(config)
    kept = partial(block_bytes_a_token, compute=compute, implementation=implementation, recompute=recompute)
    block = kept(shape.width, shape.heads, shape.mlp_dim, dropout=model.dropout > 0)
    if model.layer_scale is not None and implementation != "fused":
        block += 2 * compute * shape.width  # what is scaled
    norm = 4 if implementation == "reference" else compute  # of a number that goes into a normalisation
    encoder = [seen * block] * shape.depth
    final = seen * ((norm + compute) * shape.width + 8)  # final norm; its output, to embed
    width, predicted = mae.decoder_width, 3 * shape.patch_size**2
    block = kept(width, mae.decoder_heads, MLP_RATIO * width)
    keys = last_block_bytes_a_token(width, compute, implementation)
    decoder = shape.tokens * ((mae.decoder_depth - 1) * block + keys)
    of_masked = block - 2 * compute * width  # in the last block, but for its keys and values
    of_masked += (norm + compute) * width + 8  # final norm, and its output
    of_masked += 4 * predicted + 8  # how far the prediction is from the pixels, and which patch it is
    visible = 1 - masked / shape.patches
    pixels = pixel_bytes(model, config.train.precision, implementation, share=visible)
    later = final + decoder + masked * of_masked
    return pixels + kept_by_row(encoder, checkpointed_blocks(config), seen * compute * shape.width, later)


def self_distillation_bytes(config: Config, dino: DinoConfig, implementation: Implementation) -> int:
    """As `activation_bytes`, of all views of an image, with what is kept of their projection and of the scores."""
    model, precision, compute = config.model, config.train.precision, COMPUTE_BYTES[config.train.precision]
    kept = partial(
        activation_bytes,
        precision=precision,
        implementation=implementation,
        recompute=recompute_mode(config),
        checkpointed=checkpointed_blocks(config),
    )
    small = kept(model.model_copy(update={"image_size": dino.local_size})) if dino.local_views else 0
    projection = 4 * compute * dino.projection_width + (4 + compute) * dino.bottleneck
    scores = (2 * compute + 8) * dino.prototypes  # before and after the temperature; their gradient; the target
    views = 2 + dino.local_views
    return 2 * kept(model) + dino.local_views * small + views * (projection + scores)


def contrastive_bytes(config: Config, moco: MocoConfig, implementation: Implementation) -> int:
    """As `activation_bytes`, of both views of an image, with what is kept of their projection and of the scores."""
    model, precision, compute = config.model, config.train.precision, COMPUTE_BYTES[config.train.precision]
    encoder = activation_bytes(
        model, precision, implementation, recompute_mode(config), checkpointed=checkpointed_blocks(config)
    )
    if moco.frozen_patches:
        encoder -= pixel_bytes(model, precision, implementation) - 3 * model.image_size**2
    hidden = 3 * (4 + 4 + compute) * moco.hidden_width  # centred, normalised, and after the ReLU
    outputs = 2 * (4 + compute) * moco.outputs
    scores = (4 + 4 + 1) * config.train.global_batch_size  # before and after the softmax, and which count
    return 2 * (encoder + hidden + outputs + scores)


def masked_patch_bytes(config: Config, masked_patch: MaskedPatchConfig, implementation: Implementation) -> int:
    """As `activation_bytes`, of masked patch prediction: with what is kept of the corruption and of the predictions."""
    model, precision, compute = config.model, config.train.precision, COMPUTE_BYTES[config.train.precision]
    shape, recompute = resolve_shape(model), recompute_mode(config)
    encoder = activation_bytes(
        model, precision, implementation, recompute, checkpointed=checkpointed_blocks(config), every_token=True
    )
    corruption = shape.patches * 10  # kind, its mask, and source
    predicted = predicted_numbers(shape, masked_patch)
    of_chosen = compute * shape.width + 8  # its output, and which patch it is
    of_output = 8 if implementation == "reference" else compute + 8  # plain PyTorch keeps no logits in 16 bits
    of_chosen += predicted * (4 if masked_patch.target == "pixels" else of_output)
    return encoder + corruption + masked_count(shape.patches, masked_patch.ratio) * of_chosen


def pixel_bytes(model: ModelConfig, precision: str, implementation: Implementation, share: float = 1.0) -> int:
    """Of an image; and of its patches, which plain PyTorch keeps. share: of the patches that are embedded.

    With a ResNet, of an image and all maps that it makes of it.
    """
    resnet = resolve_shape(model).resnet
    if resnet is not None:
        return 3 * model.image_size**2 + convolution_bytes(resnet, model.image_size, COMPUTE_BYTES[precision])
    plain = implementation == "reference" or (implementation == "composed" and precision == "fp32")
    return round(3 * model.image_size**2 * (1 + share * COMPUTE_BYTES[precision] if plain else 1))


def frozen_activation_bytes(model: ModelConfig, precision: str, implementation: Implementation) -> int:
    """As `activation_bytes`, of a model whose head alone learns: its input, and its output."""
    shape, compute = resolve_shape(model), COMPUTE_BYTES[precision]
    if shape.resnet is None:
        pixels = pixel_bytes(model, precision, implementation)
    else:
        pixels = 3 * model.image_size**2 * (1 + compute) + passing_bytes(shape.resnet, model.image_size, compute)
    tokens = 2 * shape.tokens * shape.width * compute  # the input of a block and its output
    return pixels + tokens + compute * shape.width + (compute + 8) * model.num_classes


def work_bytes(config: Config, implementation: Implementation) -> int:
    """Of the gradients inside one block, for each image: W_1's output and its gradient, x and qkv and theirs.

    With FP8 also its operands, which are there during a product: a gradient in both layouts and what it multiplies; in
    plain PyTorch, these in float32 beside their bits.
    """
    shape, compute, mae = resolve_shape(config.model), COMPUTE_BYTES[config.train.precision], config.pretraining
    wide = 4 if implementation == "reference" else compute

    def of_block(tokens: int, width: int, mlp_dim: int) -> int:
        return tokens * (compute * (2 * mlp_dim + 3 * width) + 3 * wide * width)

    encoder = of_block(tokens_in_training(config), shape.width, shape.mlp_dim) if shape.is_transformer else 0
    if config.train.precision == "fp8":
        largest = max(sum(layer_sizes(shape)[name]) for name in config.train.fp8.layers)
        encoder += tokens_in_training(config) * (12 if implementation == "reference" else 2) * largest
    if config.model.pos_embed == "relative":  # the gradient of the bias, and what it is padded to
        encoder += tokens_in_training(config) * 4 * compute * shape.heads * shape.tokens
    if shape.resnet is not None:
        encoder = max(encoder, passing_bytes(shape.resnet, config.model.image_size, compute))
    if isinstance(mae, MaeConfig):
        return max(encoder, of_block(shape.tokens, mae.decoder_width, MLP_RATIO * mae.decoder_width))
    return encoder
