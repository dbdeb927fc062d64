"""How many bytes of an image the forward pass keeps for the backward pass, and what that needs beside them."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

from fastvit_engine.config import Config, DinoConfig, MaeConfig, MaskedPatchConfig, MocoConfig, ModelConfig
from fastvit_engine.config.fp8 import layer_sizes
from fastvit_engine.config.model_shape import masked_count, predicted_numbers, tokens_in_training
from fastvit_engine.config.timm_model import is_timm
from fastvit_engine.models import resolve_shape
from fastvit_engine.models.masked_autoencoder import MLP_RATIO
from fastvit_engine.sizing.convolutions import convolution_bytes, passing_bytes
from fastvit_engine.sizing.parameters import COMPUTE_BYTES, DTYPES
from fastvit_kernels import dispatch
from fastvit_kernels.mlp.op import Recompute

# of a block: Triton; a composition of operations that choose for themselves, as with dropout; plain PyTorch
Implementation = Literal["fused", "composed", "reference"]


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
