"""What of a model `train.precision: fp8` computes in FP8, and the combinations that make no sense."""

from collections.abc import Mapping

from fastvit_engine.config.model_shape import Shape
from fastvit_engine.config.sections import Config, Fp8Config
from fastvit_engine.config.timm_model import is_timm
from fastvit_engine.errors import UserError

_MULTIPLE = 16  # that both sizes of a weight must be of


def layers_in_fp8(config: Config, shape: Shape) -> tuple[str, ...]:
    """Those of `train.fp8.layers` whose sizes FP8 products take: multiples of 16."""
    sizes = layer_sizes(shape)
    return tuple(name for name in config.train.fp8.layers if all(size % _MULTIPLE == 0 for size in sizes[name]))


def layer_sizes(shape: Shape) -> Mapping[str, tuple[int, int]]:
    """Outputs and inputs of each linear layer of a block."""
    width, hidden = shape.width, shape.mlp_dim
    return {"qkv": (3 * width, width), "proj": (width, width), "fc1": (hidden, width), "fc2": (width, hidden)}


def blocks_in_fp8(settings: Fp8Config, depth: int) -> range:
    """The blocks of the model, by number, with layers in FP8."""
    return range(settings.bf16_first_blocks, max(settings.bf16_first_blocks, depth - settings.bf16_last_blocks))


def check_fp8(config: Config, shape: Shape | None) -> None:
    """Raises UserError if `train.precision: fp8` cannot act, or its settings do without it.

    shape: of the model; None: it is not known yet, or a model of timm.
    """
    train, settings = config.train, config.train.fp8
    if train.precision != "fp8":
        for key in sorted(settings.model_fields_set):
            if getattr(settings, key) != getattr(Fp8Config(), key):
                raise UserError(
                    f"train.fp8.{key} acts with train.precision = fp8, which is {train.precision}: set "
                    "train.precision=fp8, or leave it out"
                )
        return
    instead = "set train.precision=bf16"
    if is_timm(config.model):
        raise UserError(
            f"train.precision = fp8 is for the blocks of this engine's Transformers, and model.name = "
            f"{config.model.name} is a model of timm: {instead}"
        )
    if shape is not None and not shape.is_transformer:
        raise UserError(
            f"train.precision = fp8 is for the blocks of a Transformer, and model.name = {config.model.name} is a "
            f"ResNet: {instead}"
        )
    if train.compile:
        raise UserError(f"train.precision = fp8 cannot be compiled: set train.compile=false, or {instead[4:]}")
    if config.optimizer.frozen == "backbone":
        raise UserError(
            "train.precision = fp8 is for training the blocks, which optimizer.frozen = backbone keeps as they are: "
            f"{instead}"
        )
    if shape is None:
        return
    first, last = settings.bf16_first_blocks, settings.bf16_last_blocks
    if not blocks_in_fp8(settings, shape.depth):
        raise UserError(
            f"train.fp8.bf16_first_blocks = {first} and train.fp8.bf16_last_blocks = {last} leave none of the "
            f"{shape.depth} blocks to FP8: lower them, or {instead}"
        )
    if not layers_in_fp8(config, shape):
        raise UserError(
            f"none of train.fp8.layers = {', '.join(settings.layers)} has sizes that are multiples of {_MULTIPLE}, as "
            f"FP8 products need (width {shape.width}, MLP {shape.mlp_dim}): {instead}"
        )
