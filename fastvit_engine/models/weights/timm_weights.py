"""Weights of any model of timm: of a run of ours, of a file that says its model, or of a file of timm's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvit_engine.config import ModelConfig
from fastvit_engine.config.sections import BEFORE_EVAL_TRANSFORM
from fastvit_engine.config.timm_model import check_timm_model, is_timm
from fastvit_engine.errors import UserError
from fastvit_engine.models.timm_library import (
    classifier_parameters,
    create,
    find_architecture,
    import_timm,
    insist_on_import,
    kept_random_state,
    skeleton,
)
from fastvit_engine.models.timm_model import TimmModel, build_timm, clear_head
from fastvit_engine.models.weights.entries import check_finite, check_shapes
from fastvit_engine.models.weights.position import Interpolation
from fastvit_engine.models.weights.pretrained import USUAL, Load, Pretrained, from_tensors, model_config
from fastvit_engine.shown import brief

_COUNTER = ".num_batches_tracked"  # which files may lack, and which no answer of a model depends on
_TRANSFORMS = {"bicubic": "timm", "bilinear": "fast"}


@dataclass(frozen=True)
class TimmWeights(Pretrained):
    """As `Pretrained`, of a model of timm: `shapes` are of its parameters and of the buffers in its state dict.

    stored: the config of the model as it is stored, whose tensors `source` reads; `config` may be of other images or
    classes. of_timm: whether `source` is in a form that only timm's own loader reads.
    """

    stored: ModelConfig | None = None
    source: Load = lambda names: {}
    found: tuple[str, ...] = ()  # what `source` has
    of_timm: bool = False
    new_head: bool = False

    @property
    def buffers(self) -> frozenset[str]:
        return state_of(self.config).buffers & self.shapes.keys()

    @property
    def head_biases(self) -> tuple[str, ...]:
        return tuple(sorted(n for n in state_of(self.config).of_classifier if n.endswith("bias")))

    def changed(
        self,
        *,
        image_size: int | None = None,
        num_classes: int | None = None,
        interpolation: Interpolation = "bilinear",
    ) -> "TimmWeights":
        """As of `Pretrained`; what depends on the size of images is resampled by timm, as timm does it.

        num_classes: the linear layers of the classifier are of zeros.
        """
        config = self.config
        if image_size is not None:
            config = _with(config, image_size=image_size)
        if num_classes is not None:
            config = _with(config, num_classes=num_classes, head_bias=0.0)
        if config == self.config and num_classes is None:
            return self
        changed = replace(
            self,
            config=config,
            shapes=state_of(config).shapes,
            new_head=self.new_head or num_classes is not None,
            class_names=None if num_classes is not None else self.class_names,
        )
        return replace(changed, load=lambda names: _picked(changed.build(), names))

    def build(self) -> TimmModel:
        pixels = self.pixels or {"mean": USUAL, "std": USUAL}
        self.warn_of_pixels()
        with kept_random_state():
            model = build_timm(self.config, mean=pixels["mean"], std=pixels["std"])
            self._fill(model)
        model.class_names = self.class_names
        if "eval_crop" in pixels:
            model.eval_crop = pixels["eval_crop"]
            model.eval_transform = pixels.get("eval_transform", BEFORE_EVAL_TRANSFORM)
        model.eval()
        return model

    @torch.no_grad()
    def _fill(self, model: TimmModel) -> None:
        """Gives a model these weights, each of them, or raises UserError."""
        assert self.stored is not None
        state = self.source(list(self.found))
        check_finite(state, self.where, "parameter")
        before = _with(self.stored, image_size=self.config.image_size)
        if self.of_timm or before != self.stored:
            state = _through_timm(before, state, self.where)
        whole = dict(model.state_dict(keep_vars=True))
        of_head = model.of_classifier if self.new_head else frozenset()
        for name in state_of(self.config).shapes:
            ours, theirs = whole[name], state.get(name)
            if name in of_head or (theirs is None and name.endswith(_COUNTER)):
                continue
            if theirs is None or theirs.shape != ours.shape:
                there = "absent" if theirs is None else brief(list(theirs.shape))
                raise UserError(
                    f"{self.where}: parameter '{name}' is {there} there and {list(ours.shape)} in the model that it is "
                    "of"
                )
            ours.copy_(theirs)
        if self.new_head:
            clear_head(model)


def _through_timm(config: ModelConfig, state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The state dict of the model of `config` after timm's own loader has put these tensors into it, strictly."""
    overlay = {"state_dict": state, "num_classes": config.num_classes, "label_offset": 0}
    try:
        model = create(config, pretrained=True, pretrained_cfg_overlay=overlay)
    except UserError as error:
        raise UserError(f"{where} is not read as weights of {config.name}: {error}") from error
    return dict(model.state_dict())


def open_tensors(
    where: str,
    config: ModelConfig,
    found: Mapping[str, Sequence[int]],
    load: Load,
    pixels: Mapping[str, Any] | None,
    class_names: tuple[str, ...] | None = None,
    *,
    name: str | None = None,
) -> Pretrained:
    """As `from_tensors`, of any model, our own or timm's, that is stored under the names of its state dict.

    name: what the user says that the model is called. Raises UserError also if timm has no such model, or if `name` is
    not that of `config`.
    """
    if name is not None and (not is_timm(config) or name != config.name):
        raise UserError(f"{where} says itself which model it is of, {config.name}: leave the name '{name}' out")
    if not is_timm(config):
        return from_tensors(where, config, found, load, pixels, class_names)
    check_timm_model(config)
    insist_on_import(config.name, where, name)
    expected = state_of(config).shapes
    counters = {name: shape for name, shape in expected.items() if name.endswith(_COUNTER) and name not in found}
    check_shapes(expected, {**found, **counters}, where, "parameter")

    def load_finite(names: Sequence[str]) -> dict[str, Tensor]:
        tensors = load([name for name in names if name not in counters])
        check_finite(tensors, where, "parameter")
        return {name: tensors[name] if name in tensors else torch.zeros((), dtype=torch.int64) for name in names}

    return TimmWeights(
        where, config, expected, load_finite, pixels, class_names, stored=config, source=load, found=tuple(found)
    )


def open_timm_file(
    where: str,
    name: str,
    found: Mapping[str, Sequence[int]],
    load: Load,
    *,
    arguments: Mapping[str, Any] | None = None,
) -> TimmWeights:
    """The weights of a file of timm's, or in a form that timm reads. name: "timm/resnet50.a1_in1k".

    arguments: as model.timm. How images are prepared is what timm says of that name. Raises UserError if they are not
    of that model.
    """
    config = model_config({"name": name, "num_classes": 0, "timm": dict(arguments or {})}, where)
    check_timm_model(config)
    architecture = find_architecture(name).architecture
    said = _pretrained_cfg(architecture)
    config = _with(config, image_size=int((said.get("input_size") or (3, 224, 224))[1]))
    config = _with(config, num_classes=_classes_of(said, found))
    shapes = state_of(config).shapes
    crop, transform = said.get("crop_pct"), _TRANSFORMS.get(said.get("interpolation") or "")
    pixels: dict[str, Any] = {key: tuple(said[key]) for key in ("mean", "std") if said.get(key) is not None}
    if pixels and transform is not None and isinstance(crop, int | float):
        pixels |= {"eval_crop": crop, "eval_transform": transform}
    opened = TimmWeights(
        where, config, shapes, load, pixels or None, stored=config, source=load, found=tuple(found), of_timm=True
    )
    return replace(opened, load=lambda names: _picked(opened.build(), names))


def _pretrained_cfg(architecture: str) -> dict[str, Any]:
    cfg = import_timm().get_pretrained_cfg(architecture, allow_unregistered=True)
    return {} if cfg is None else dict(cfg.to_dict())


def _classes_of(said: Mapping[str, Any], found: Mapping[str, Sequence[int]]) -> int:
    """How many classes the classifier in a file has; 0 if there is none."""
    named = said.get("classifier") or ()
    for name in (named,) if isinstance(named, str) else named:
        shape = found.get(f"{name}.weight")
        if shape:
            return int(shape[0])
    for name in ("head.weight", "head.fc.weight", "fc.weight", "classifier.weight"):  # before timm renamed them
        if len(found.get(name, ())) in (2, 4):
            return int(found[name][0])
    return 0


class State(NamedTuple):
    """What the state dict of a model of timm has, each tensor once."""

    shapes: Mapping[str, tuple[int, ...]]  # in the order of the state dict
    dtypes: Mapping[str, torch.dtype]
    buffers: frozenset[str]  # those of them that are no parameters
    of_classifier: frozenset[str]


@lru_cache
def state_of(config: ModelConfig) -> State:
    """Read from a model without memory. Raises UserError if there is no such model."""
    model = skeleton(config)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    first = parameters.keys() | buffers.keys()  # without second names of a parameter
    kept = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name in first}
    return State(
        {name: tuple(tensor.shape) for name, tensor in kept.items()},
        {name: tensor.dtype for name, tensor in kept.items()},
        frozenset(kept.keys() & buffers.keys()),
        classifier_parameters(model),
    )


def _picked(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    whole = model.state_dict()
    return {name: whole[name].clone() for name in names}


def _with(config: ModelConfig, **changes: Any) -> ModelConfig:
    return model_config({**config.model_dump(), **changes}, config.name)
