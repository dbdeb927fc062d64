"""What a model costs, counted from its shape: profilers that patch PyTorch functions do not see custom kernels."""

from fastvit_engine.config import ModelConfig
from fastvit_engine.config.model_shape import Shape, resolve_shape


def forward_macs(config: ModelConfig) -> int:
    """Multiply-accumulates of one image's forward pass, matrix products only (1 MAC = 2 FLOPs).

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


def _attention_pool_macs(shape: Shape) -> int:
    """Of one query that attends to all patches, and of the MLP behind it."""
    width = shape.width
    projections = 2 * width**2 + shape.patches * 2 * width**2  # query and output; keys and values
    return projections + 2 * shape.patches * width + 2 * width * shape.mlp_dim


def training_flops(config: ModelConfig, *, frozen: str = "none") -> int:
    """Floating-point operations that one image costs in training: 6 x MACs.

    Two operations a MAC, and a backward pass of twice the forward (gradients of inputs and of weights). With the
    epochs and images of pretraining this gives the exaFLOPs of Dosovitskiy et al. 2021, Table 6. A frozen backbone (see
    `optimizer.frozen`) has a forward pass only, and the head below it no gradient of its inputs.
    """
    if frozen == "none":
        return 6 * forward_macs(config)
    head = resolve_shape(config).width * config.num_classes
    return 2 * forward_macs(config) + 2 * head
