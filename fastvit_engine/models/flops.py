"""What a model costs, counted from its shape: profilers that patch PyTorch functions do not see custom kernels."""

from fastvit_engine.config import ModelConfig
from fastvit_engine.config.model_shape import Shape, resolve_shape


def forward_macs(config: ModelConfig) -> int:
    """Multiply-accumulates of the whole model for one image, forward, matrix products only (1 MAC = 2 FLOPs).

    The figure that papers and profilers give of a Vision Transformer: every block is counted for every token.
    Elementwise work, softmax and normalisation are left out, as is usual (Kaplan et al. 2020, section 2.1).
    """
    shape = resolve_shape(config)
    tokens, width = shape.tokens, shape.width
    patch_projection = shape.patches * 3 * shape.patch_size**2 * width
    projections = tokens * 4 * width**2  # queries, keys, values and output
    attention = 2 * tokens**2 * width  # scores and weighted values
    mlp = 2 * tokens * width * shape.mlp_dim
    hidden = width**2 if config.head == "mlp" else 0
    pooling = _attention_pool_macs(shape) if config.pool == "map" else 0
    blocks = shape.depth * (projections + attention + mlp)
    return patch_projection + blocks + pooling + hidden + width * config.num_classes


def computed_macs(config: ModelConfig) -> int:
    """As `forward_macs`, of what `VisionTransformer` computes: with a class token, the last block is for it alone.

    The block still has keys and values of all tokens; queries, attention, output projection and MLP are of one.
    """
    if config.pool != "cls":
        return forward_macs(config)
    shape = resolve_shape(config)
    width = shape.width
    of_a_token = 2 * width**2 + 2 * shape.tokens * width + 2 * width * shape.mlp_dim
    return forward_macs(config) - (shape.tokens - 1) * of_a_token


def _attention_pool_macs(shape: Shape) -> int:
    """Of one query that attends to all patches, and of the MLP behind it."""
    width = shape.width
    projections = 2 * width**2 + shape.patches * 2 * width**2  # query and output; keys and values
    return projections + 2 * shape.patches * width + 2 * width * shape.mlp_dim


def training_flops(config: ModelConfig, *, frozen: str = "none") -> int:
    """Floating-point operations of the whole model in training, for one image: 6 x MACs, see `forward_macs`.

    Two operations a MAC, and a backward pass of twice the forward (gradients of inputs and of weights). With the
    epochs and images of pretraining this gives the exaFLOPs of Dosovitskiy et al. 2021, Table 6. A frozen backbone (see
    `optimizer.frozen`) has a forward pass only, and the head below it no gradient of its inputs.
    """
    return _training_flops(forward_macs(config), config, frozen)


def computed_flops(config: ModelConfig, *, frozen: str = "none") -> int:
    """As `training_flops`, of what is computed, see `computed_macs`: what speed and utilisation are counted in."""
    return _training_flops(computed_macs(config), config, frozen)


def _training_flops(macs: int, config: ModelConfig, frozen: str) -> int:
    if frozen == "none":
        return 6 * macs
    head = resolve_shape(config).width * config.num_classes
    return 2 * macs + 2 * head
