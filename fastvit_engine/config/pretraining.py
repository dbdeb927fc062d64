"""What goes together with an objective that learns without labels, and what would have no effect or no sense."""

from fastvit_engine.config.model_shape import GRID_CELLS, Shape, masked_count, resolve_shape
from fastvit_engine.config.sections import Config, DinoConfig, MaeConfig, MaskedPatchConfig, MocoConfig
from fastvit_engine.errors import UserError


def check_pretraining(config: Config) -> None:
    """Raises UserError, naming the keys, if a configuration asks for what its self-supervised objective cannot do."""
    objective = f"train.objective = {config.train.objective}"
    if config.model.num_classes != 0:
        raise UserError(
            f"model.num_classes is {config.model.num_classes:,}, a head that {objective} does not train: set "
            "model.num_classes=0"
        )
    for key, value, off in _without_effect(config):
        raise UserError(f"{key} = {value} has no effect with {objective}, which learns without labels: set {key}={off}")
    if config.model.pool == "map":
        raise UserError(f"model.pool = map is attention pooling, which {objective} does not train: set cls or gap")
    if config.optimizer.frozen != "none":
        raise UserError(
            f"optimizer.frozen = {config.optimizer.frozen} leaves {objective} nothing to learn: set "
            "optimizer.frozen=none"
        )
    best = config.checkpoint.keep_best
    if best is not None and not best.endswith(".loss"):
        raise UserError(
            f"checkpoint.keep_best = {best} needs labels, and {objective} has none: set "
            f"checkpoint.keep_best={best.partition('.')[0]}.loss"
        )
    if isinstance(config.pretraining, MaeConfig):
        _check_decoder(config.pretraining)
    elif isinstance(config.pretraining, DinoConfig | MocoConfig):
        _check_teacher(config)
    if config.model.pos_embed == "relative":
        _check_relative(config)
    if config.init.from_ is not None and "name" not in config.model.model_fields_set:
        return  # the weights say how many patches there are
    _check_convolutions(resolve_shape(config.model), config)
    if isinstance(config.pretraining, MaeConfig):
        _check_hidden(resolve_shape(config.model).patches, config.pretraining.mask_ratio)
    elif isinstance(config.pretraining, DinoConfig):
        _check_small_views(resolve_shape(config.model).patch_size, config)
    elif isinstance(config.pretraining, MaskedPatchConfig):
        _check_chosen(resolve_shape(config.model), config.pretraining)


def _check_convolutions(shape: Shape, config: Config) -> None:
    """Raises UserError if an objective cannot train a ResNet, or a hybrid of one and a Transformer."""
    objective, name = f"train.objective = {config.train.objective}", f"model.name = {config.model.name}"
    if not shape.is_transformer:
        raise UserError(
            f"{objective} trains Vision Transformers, and {name} is a ResNet: set train.objective=classify, or another "
            "model.name"
        )
    if not shape.is_hybrid:
        return
    if isinstance(config.pretraining, MaeConfig | MaskedPatchConfig):
        raise UserError(
            f"{objective} hides patches, and in a hybrid ({name}) a ResNet sees the whole image before there are any: "
            "set a model.name without one, such as B/16, or another objective"
        )
    if isinstance(config.pretraining, MocoConfig) and config.moco.frozen_patches:
        raise UserError(
            f"moco.frozen_patches = True keeps a random projection of patches, and in a hybrid ({name}) it would keep "
            "a random ResNet: set moco.frozen_patches=false"
        )


def _without_effect(config: Config) -> list[tuple[str, object, object]]:
    """(key, value, value that leaves it off) of what is set and acts on labels only."""
    settings: list[tuple[str, object, object]] = [
        ("model.head", config.model.head, "linear"),
        ("init.head", config.init.head, "new"),
        ("data.max_labels", config.data.max_labels, 1),
        ("data.soft_labels", bool(config.data.soft_labels), False),
        ("augment.mixup", config.augment.mixup, 0),
        ("augment.cutmix", config.augment.cutmix, 0),
        ("loss.kind", config.loss.kind, "softmax"),
        ("loss.label_smoothing", config.loss.label_smoothing, 0),
    ]
    return [(key, value, off) for key, value, off in settings if value != off]


def _check_teacher(config: Config) -> None:
    objective = f"train.objective = {config.train.objective}"
    if config.ema.decay is None:
        raise UserError(f"{objective} has the average of the weights for a teacher: set ema.decay, as 0.99")
    if config.data.eval is not None:
        raise UserError(
            f"data.eval is set, and the loss of {objective} says nothing of held-out images, as its teacher changes: "
            "set data.eval=null, and evaluate.fewshot to measure what is learned"
        )
    if config.augment.randaugment_ops or config.augment.crop != "inception":
        raise UserError(
            f"{objective} distorts its views itself, and crops them as augment.crop = inception does: set "
            "augment.randaugment_ops=0 and augment.crop=inception"
        )
    if isinstance(config.pretraining, MocoConfig) and config.train.global_batch_size < 2:
        raise UserError(f"train.global_batch_size is 1, and {objective} tells images apart: set it to 2 or more")


def _check_small_views(patch_size: int, config: Config) -> None:
    size = config.dino.local_size
    if config.dino.local_views and (size % patch_size or size > config.model.image_size):
        raise UserError(
            f"dino.local_size is {size}, which is no multiple of the patch size {patch_size} up to model.image_size = "
            f"{config.model.image_size}: set it to one"
        )


def _check_relative(config: Config) -> None:
    """Raises UserError if the model sees other tokens than those whose distances it knows."""
    if isinstance(config.pretraining, MaeConfig):
        raise UserError(
            "model.pos_embed = relative counts the tokens between two patches, and train.objective = mae leaves "
            "patches out: set another model.pos_embed"
        )
    size, whole = config.dino.local_size, config.model.image_size
    if isinstance(config.pretraining, DinoConfig) and config.dino.local_views and size != whole:
        raise UserError(
            f"model.pos_embed = relative is for images of one size, and dino.local_size is {size} where "
            f"model.image_size is {whole}: set another model.pos_embed, or dino.local_views=0"
        )


def _check_decoder(mae: MaeConfig) -> None:
    if mae.decoder_width % mae.decoder_heads:
        raise UserError(
            f"mae.decoder_heads {mae.decoder_heads} does not divide mae.decoder_width {mae.decoder_width}; set one of "
            "them to fit the other"
        )
    if mae.decoder_width % 4 or mae.decoder_width < 8:
        raise UserError(f"mae.decoder_width must be a multiple of 4 from 8 on, not {mae.decoder_width}")


def _check_hidden(patches: int, ratio: float) -> None:
    hidden = masked_count(patches, ratio)
    if not 0 < hidden < patches:
        raise UserError(
            f"mae.mask_ratio = {ratio:g} hides {hidden} of the {patches} patches of an image: hide some and leave some"
        )


def _check_chosen(shape: Shape, masked_patch: MaskedPatchConfig) -> None:
    if shape.patches < 2 or masked_count(shape.patches, masked_patch.ratio) == 0:
        raise UserError(
            f"masked_patch.ratio = {masked_patch.ratio:g} chooses none of the {shape.patches} patches of an image, or "
            "there is no other to exchange one with: raise it, or use smaller patches"
        )
    if masked_patch.target == "grid" and shape.patch_size % GRID_CELLS:
        raise UserError(
            f"masked_patch.target = grid cuts patches into {GRID_CELLS} x {GRID_CELLS} cells, which patches of "
            f"{shape.patch_size} pixels do not have: set masked_patch.target=mean"
        )
