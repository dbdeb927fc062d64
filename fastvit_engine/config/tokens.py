"""What goes together with fewer tokens in a part of the training, and what would have no effect or no sense."""

from fastvit_engine.config.model_shape import masked_count, resolve_shape
from fastvit_engine.config.resnet_shape import bit_shape
from fastvit_engine.config.sections import Config
from fastvit_engine.config.timm_model import is_timm
from fastvit_engine.duration import parse_duration
from fastvit_engine.errors import UserError


def check_tokens(config: Config) -> None:
    """Raises UserError, naming the keys, if section `tokens` asks for what the model or the run cannot do."""
    tokens = config.tokens
    if tokens.patch_drop == 0 and not tokens.image_sizes:
        return
    key = f"tokens.patch_drop = {tokens.patch_drop:g}" if tokens.patch_drop else "tokens.image_sizes is set, which"
    off = "tokens.patch_drop=0" if tokens.patch_drop else "tokens.image_sizes=[]"
    objective = config.train.objective
    if objective != "classify":
        why = {
            "mae": "chooses itself which patches the model sees",
            "masked_patch": "predicts patches from all others",
            "dino": "chooses the sizes of its views itself (dino.local_size)",
            "moco": "compares views of one size",
        }.get(objective, "calls the model itself")
        raise UserError(f"{key} is for train.objective = classify, and {objective} {why}: set {off}")
    if config.optimizer.frozen == "backbone":
        raise UserError(
            f"{key} would train the head on other features than it is measured on, as optimizer.frozen = backbone "
            f"keeps the backbone as it is: set {off}"
        )
    if is_timm(config.model):
        raise UserError(
            f"{key} is for the models of this engine, and model.name is {config.model.name}: set {off}; some models of "
            "timm drop patches themselves, see model.timm"
        )
    if tokens.patch_drop:
        _check_patch_drop(config)
    if tokens.image_sizes:
        _check_image_sizes(config)


def _check_patch_drop(config: Config) -> None:
    tokens, name = config.tokens, config.model.name
    _check_points(config, [("tokens.patch_drop_until", tokens.patch_drop_until)])
    if (_share(config, tokens.patch_drop_until)) == 0:
        raise UserError(f"tokens.patch_drop_until = '{tokens.patch_drop_until}' drops nothing: set tokens.patch_drop=0")
    if config.model.pos_embed == "relative":
        raise UserError(
            "model.pos_embed = relative counts the tokens between two patches, and tokens.patch_drop leaves patches "
            "out: set another model.pos_embed, or tokens.patch_drop=0"
        )
    if not _names_a_model(config):
        return
    shape = resolve_shape(config.model)
    if shape.resnet is not None:
        kind = "a ResNet, which has none" if not shape.is_transformer else "a hybrid, whose ResNet sees whole images"
        raise UserError(f"tokens.patch_drop leaves patches out, and model.name = {name} is {kind}: set it to 0")
    smallest = min([config.model.image_size, *(size for size, _ in tokens.image_sizes)])
    patches = (smallest // shape.patch_size) ** 2
    dropped = masked_count(patches, tokens.patch_drop)
    if not 0 < dropped < patches:
        raise UserError(
            f"tokens.patch_drop = {tokens.patch_drop:g} drops {dropped} of the {patches} patches of an image of "
            f"{smallest} pixels: drop some and leave some"
        )


def _check_image_sizes(config: Config) -> None:
    sizes, model = [size for size, _ in config.tokens.image_sizes], config.model
    _check_points(config, [("tokens.image_sizes", until) for _, until in config.tokens.image_sizes])
    if (_share(config, config.tokens.image_sizes[-1][1]) or 0) >= 1:
        raise UserError(
            "tokens.image_sizes leaves no step to images of model.image_size, which evaluation sees: let the last size "
            "end before the run does"
        )
    if sizes != sorted(set(sizes)):
        raise UserError(f"tokens.image_sizes has the sizes {_listed(sizes)}: let each be larger than the one before")
    if sizes[-1] >= model.image_size and ("image_size" in model.model_fields_set or _names_a_model(config)):
        raise UserError(
            f"tokens.image_sizes has {sizes[-1]}, and model.image_size = {model.image_size} is what the run ends with: "
            "name smaller sizes"
        )
    if model.pos_embed == "relative":
        raise UserError(
            "model.pos_embed = relative is for images of one size, and tokens.image_sizes has others: set another "
            "model.pos_embed, or tokens.image_sizes=[]"
        )
    if not _names_a_model(config) or bit_shape(model.name) is not None:
        return
    patch_size = resolve_shape(model).patch_size
    if odd := [size for size in sizes if size % patch_size]:
        raise UserError(
            f"tokens.image_sizes has {odd[0]}, which is no multiple of the patch size {patch_size} of model.name = "
            f"{model.name}: choose one"
        )


def _check_points(config: Config, points: list[tuple[str, str]]) -> None:
    """Raises UserError for points of the run that are after its end, or not after the one before."""
    before: tuple[str, float] | None = None
    for key, until in points:
        share = _share(config, until)
        if share is None:  # only the data can tell: the schedule decides
            continue
        if share > 1:
            raise UserError(
                f"{key} has the point '{until}', after the end of train.duration = '{config.train.duration}': choose "
                "an earlier one"
            )
        if before is not None and share <= before[1]:
            raise UserError(f"{key} has the point '{until}' after '{before[0]}', which is not earlier: let them rise")
        before = until, share


def _share(config: Config, until: str) -> float | None:
    """A point of the run as a share of it; None if that depends on the data."""
    (value, unit), (length, of) = parse_duration(until), parse_duration(config.train.duration)
    if unit == "%":
        return value / 100
    return value / length if unit == of and length > 0 else None


def _names_a_model(config: Config) -> bool:
    """Whether the configuration says the model, and not weights that it starts from."""
    return config.init.from_ is None or "name" in config.model.model_fields_set


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))
