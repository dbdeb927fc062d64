"""Models of timm by name (`model.name: timm/NAME`): what a name says, and which settings mean something for them.

Needs neither timm nor PyTorch: names are checked early.
"""

import re
from dataclasses import dataclass

from fastvit_engine.config.sections import Config, ModelConfig
from fastvit_engine.errors import UserError

PREFIX = "timm/"
_NAME = re.compile(r"timm/(?:(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*):)?(?P<architecture>\w+(?:\.\w+)?)", re.ASCII)

# Keys of `model` that mean something for a model of timm; by the others, Vision Transformers are shaped.
_OF_ALL = {"name", "image_size", "num_classes", "dropout", "drop_path", "head_bias", "timm"}
# Arguments of `timm.create_model` that other keys give, or that nothing may give.
_GIVEN_ELSEWHERE = {
    "num_classes": "model.num_classes",
    "img_size": "model.image_size",
    "input_size": "model.image_size",
    "drop_rate": "model.dropout",
    "drop_path_rate": "model.drop_path",
    "pretrained": "init.from",
    "pretrained_cfg": "init.from",
    "pretrained_cfg_overlay": "init.from",
    "checkpoint_path": "init.from",
    "model_name": "model.name",
}
_NOT_POSSIBLE = {
    "in_chans": "images have three channels",
    "features_only": "training needs the classifier",
    "device": "the engine moves the model",
    "dtype": "train.precision sets the number format",
    "cache_dir": "nothing is downloaded",
    "scriptable": "models are not scripted",
    "exportable": "models are not scripted",
}


@dataclass(frozen=True)
class TimmName:
    """What `timm/MODULE:ARCHITECTURE` says."""

    module: str | None  # to import first, because it registers the architecture; None: timm's own
    architecture: str  # with timm's tag of pretrained weights, if there is one: "swin_tiny_patch4_window7_224.ms_in1k"


def is_timm(model: ModelConfig) -> bool:
    """Whether timm builds this model."""
    return model.name.startswith(PREFIX)


def timm_name(name: str) -> TimmName:
    """Reads `model.name`. Raises UserError if it is not of this form."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise UserError(
            f"model.name '{name}' is no name of timm: write timm/ and one that timm.list_models() has, such as "
            "timm/swin_tiny_patch4_window7_224; or timm/MODULE:NAME for a model that your own module registers"
        )
    return TimmName(match["module"], match["architecture"])


def check_timm_model(model: ModelConfig) -> None:
    """Raises UserError, naming the key, if a setting of section `model` means nothing for a model of timm."""
    if not is_timm(model):
        if model.timm:
            raise UserError(
                f"model.timm gives arguments to models of timm, and model.name is {model.name}: leave model.timm out, "
                "or set model.name=timm/NAME"
            )
        return
    timm_name(model.name)
    for key, field in ModelConfig.model_fields.items():
        value, usual = getattr(model, key), field.default
        if key not in _OF_ALL and value != usual:
            shown = "null" if usual is None else usual
            raise UserError(
                f"model.{key} = {value} shapes the Vision Transformers of this engine, and {model.name} has its own "
                f"shape: leave it out (model.{key}={shown}), and give arguments of timm's in section model.timm"
            )
    for argument in model.timm:
        if argument in _GIVEN_ELSEWHERE:
            raise UserError(f"model.timm.{argument} has a key of its own: set {_GIVEN_ELSEWHERE[argument]} instead")
        if argument in _NOT_POSSIBLE:
            raise UserError(f"model.timm.{argument} cannot be set: {_NOT_POSSIBLE[argument]}")


def check_timm_run(config: Config) -> None:
    """Raises UserError, naming the key, if a run of a model of timm asks for what only our own models can do."""
    check_timm_model(config.model)
    if not is_timm(config.model):
        return
    name = config.model.name
    if config.pretraining is not None:
        raise UserError(
            f"train.objective = {config.train.objective} works on the patches and blocks of this engine's Vision "
            f"Transformers, and model.name is {name}: set train.objective=classify, or an objective of your own"
        )
    if config.optimizer.kind == "muon":
        raise UserError(
            "optimizer.kind = muon is for the matrices of the blocks of this engine's Vision Transformers, and "
            f"model.name is {name}: set optimizer.kind=adamw"
        )
    if config.train.activation_checkpointing not in ("auto", 0):
        raise UserError(
            f"train.activation_checkpointing = {config.train.activation_checkpointing} is of this engine's Vision "
            f"Transformers, and model.name is {name}: set train.activation_checkpointing=auto, and a smaller "
            "train.micro_batch_size"
        )
    if config.train.recompute not in ("auto", "none"):
        raise UserError(
            f"train.recompute = {config.train.recompute} is of this engine's fused blocks, and model.name is {name}: "
            "set train.recompute=auto"
        )
