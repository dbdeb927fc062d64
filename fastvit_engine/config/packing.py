"""What goes together with images at their own proportions (section packing), and what has no sense with them."""

from fastvit_engine.config.model_shape import Shape, resolve_shape
from fastvit_engine.config.sections import Config, ModelConfig, PackingConfig
from fastvit_engine.config.timm_model import is_timm
from fastvit_engine.errors import UserError

_SHAPED = "packing.max_patches = {} is for images of different sizes"


def check_packing(config: Config) -> None:
    """Raises UserError, naming the keys, if packing is on and the rest of the configuration does not fit it."""
    packing = config.packing
    if packing.max_patches is None:
        for key in ("min_patches", "token_budget"):
            if (value := getattr(packing, key)) is not None:
                raise UserError(
                    f"packing.{key} is {value}, and there is no packing: set packing.max_patches, or packing.{key}=null"
                )
        return
    _check_numbers(packing, config.train.micro_batch_size)
    what = _SHAPED.format(packing.max_patches)
    if config.train.objective != "classify":
        raise UserError(
            f"{what}, and train.objective = {config.train.objective} takes squares: set train.objective=classify, or "
            "packing.max_patches=null"
        )
    for key, value, off in (
        ("tokens.patch_drop", config.tokens.patch_drop, 0),
        ("tokens.image_sizes", list(config.tokens.image_sizes), []),
    ):
        if value:
            raise UserError(
                f"{what}, and {key} = {value} is for squares: set {key}={off}; packing.min_patches saves tokens, too"
            )
    for key in ("mixup", "cutmix"):
        if getattr(config.augment, key) > 0:
            raise UserError(
                f"{what}, and augment.{key} mixes pairs of images pixel by pixel, which must have one size: set "
                f"augment.{key}=0"
            )
    if config.model.drop_path > 0:
        raise UserError(
            f"model.drop_path = {config.model.drop_path:g} drops the branches of whole images, and with packing the "
            "images of a micro-batch are one sequence, which the blocks cannot drop parts of: set model.drop_path=0"
        )
    if config.init.from_ is None or "name" in config.model.model_fields_set:  # else the weights say the name
        check_packed_model(config.model, packing)


def check_packed_model(model: ModelConfig, packing: PackingConfig) -> None:
    """Raises UserError if a model cannot see images as `packing`, which is on, resizes them."""
    assert packing.max_patches is not None
    if is_timm(model):
        raise UserError(
            f"{_SHAPED.format(packing.max_patches)}, which models of timm do not take ({model.name}): set a model.name "
            "such as B/16"
        )
    shape = resolve_shape(model)
    if (reason := _obstacle(model, shape)) is not None:
        raise UserError(f"{_SHAPED.format(packing.max_patches)}, and {reason}")
    if packing.max_patches > shape.patches:
        raise UserError(
            f"packing.max_patches is {packing.max_patches:,}, more than the {shape.patches:,} patches of a square "
            f"image of model.image_size = {model.image_size}, which memory and positions are for: lower it, or raise "
            "model.image_size"
        )
    largest = packing.max_patches + shape.prefix
    if packing.token_budget is not None and packing.token_budget < largest:
        raise UserError(
            f"packing.token_budget is {packing.token_budget}, and one image may have {largest} tokens "
            "(packing.max_patches, class token and registers): raise it"
        )


def check_packable(model: ModelConfig, shape: Shape) -> None:
    """Raises UserError if this model cannot see images of different sizes in one sequence."""
    if (reason := _obstacle(model, shape)) is not None:
        raise UserError(f"the images have different sizes, and {reason}")


def _obstacle(model: ModelConfig, shape: Shape) -> str | None:
    if shape.resnet is not None:
        return (
            f"model.name = {model.name} has convolutions, which see a whole image at a time: set a model.name without, "
            "such as B/16"
        )
    if model.pool == "map":
        return "model.pool = map is not made for them: set model.pool=gap or cls"
    if model.pos_embed == "relative":
        return (
            "model.pos_embed = relative counts tokens between two patches, which says nothing of rows of another "
            "length: set learned_2d, sincos_2d, learned or none"
        )
    if shape.patch_size == 3:
        return "patches of 3 pixels are not made for them: set another patch size in model.name"
    return None


def check_squares(config: Config) -> None:
    """Raises UserError if packing is on where images are squares in any case."""
    if config.packing.on:
        raise UserError(
            f"packing.max_patches is {config.packing.max_patches}, and this command shows squares to the model: leave "
            "it out"
        )


def budgeted_images(config: Config) -> int | None:
    """Images of a micro-batch by packing.token_budget; None if it is not set."""
    packing = config.packing
    if packing.max_patches is None or packing.token_budget is None:
        return None
    return packing.token_budget // (packing.max_patches + resolve_shape(config.model).prefix)


def _check_numbers(packing: PackingConfig, micro_batch_size: int | None) -> None:
    most, least = packing.max_patches, packing.min_patches
    if most is not None and least is not None and least > most:
        raise UserError(f"packing.min_patches is {least}, more than packing.max_patches = {most}: lower it")
    if packing.token_budget is not None and micro_batch_size is not None:
        raise UserError(
            f"packing.token_budget = {packing.token_budget} and train.micro_batch_size = {micro_batch_size} both say "
            "how large a micro-batch is: leave one of them out"
        )
