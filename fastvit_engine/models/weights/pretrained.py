"""A model as a source of weights has it, whatever its format: what every reader returns and every writer takes."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from fastvit_engine.config import ModelConfig
from fastvit_engine.config.model_shape import resolve_shape
from fastvit_engine.config.sections import BEFORE_EVAL_TRANSFORM
from fastvit_engine.errors import UserError
from fastvit_engine.models import AnyModel
from fastvit_engine.models.build import new_model
from fastvit_engine.models.positions import sincos_positions, table_shapes
from fastvit_engine.models.weights.entries import Entry, check_finite, check_shapes
from fastvit_engine.models.weights.position import Interpolation, resample_axis, resample_positions

USUAL = (0.5, 0.5, 0.5)  # mean and std of the recipes, and of the authors' code
_OF_HEAD = ("pre_logits.", "head.")

Load = Callable[[Sequence[str]], dict[str, Tensor]]


@dataclass(frozen=True)
class Pretrained:
    """A configuration, and the parameters that belong to it, under our names, which are read when they are asked for.

    where: the source, for sentences. shapes: of the parameters, in the order of the model's state dict. load: reads
    some of them: float32, on the CPU, in memory of their own; UserError if the source is damaged. pixels: "mean" and
    "std" of the pixels in [0, 1] per colour channel and, if known, "eval_crop" and "eval_transform"; None: not known.
    class_names: in the order of the outputs; None: not known.
    """

    where: str
    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]
    load: Load
    pixels: Mapping[str, Any] | None = None
    class_names: tuple[str, ...] | None = None

    def read(self, name: str) -> Tensor:
        """One parameter."""
        return self.load([name])[name]

    @property
    def buffers(self) -> frozenset[str]:
        """Which of `shapes` are no parameters; none of our own models."""
        return frozenset()

    @property
    def head_biases(self) -> tuple[str, ...]:
        """The biases that model.head_bias sets."""
        return tuple(name for name in head_shapes(self.config) if name.endswith("bias"))

    @property
    def output_names(self) -> list[str] | None:
        """A name for every output, as other programs need them: LABEL_n for output n if it has none.

        None if there is no head, or if no name is known.
        """
        outputs, names = self.config.num_classes, list(self.class_names or ())
        if not outputs or not names:
            return None
        return names[:outputs] + [f"LABEL_{index}" for index in range(len(names), outputs)]

    def changed(
        self,
        *,
        image_size: int | None = None,
        num_classes: int | None = None,
        interpolation: Interpolation = "bilinear",
    ) -> "Pretrained":
        """The same model for other images or classes; None: as it is.

        image_size: the grid part of learned position tables is resampled, see `resample_positions`, and a fixed one
        computed for the new grid; relative positions are of one size. num_classes: the tanh layer and the head are
        replaced by one linear layer of zeros; 0: by nothing.

        Raises UserError if there is no such model.
        """
        changed = self
        if num_classes is not None:
            changed = changed._with_head(num_classes)
        if image_size is not None and image_size != self.config.image_size:
            changed = changed._at_image_size(image_size, interpolation)
        return changed

    def warn_of_pixels(self) -> None:
        """Warns if mean and std are not known."""
        if self.pixels is None:
            warnings.warn(f"{self.where} does not say mean and std of its pixels: taking 0.5 and 0.5", stacklevel=4)

    def build(self) -> AnyModel:
        """The model: float32, on the CPU, in eval mode. Takes 0.5 for mean and std, with a warning, if unknown."""
        pixels = self.pixels or {"mean": USUAL, "std": USUAL}
        self.warn_of_pixels()
        with torch.device("meta"):
            model = new_model(self.config, mean=tuple(pixels["mean"]), std=tuple(pixels["std"]))
        model.load_state_dict(self.load(list(self.shapes)), assign=True)
        model.class_names = self.class_names
        if "eval_crop" in pixels:
            model.eval_crop = pixels["eval_crop"]
            model.eval_transform = pixels.get("eval_transform", BEFORE_EVAL_TRANSFORM)
        return model.eval()

    def _with_head(self, num_classes: int) -> "Pretrained":
        config = _changed(self.config, "num_classes", num_classes, head="linear", head_bias=0.0)
        kept = {name: shape for name, shape in self.shapes.items() if not name.startswith(_OF_HEAD)}
        new = head_shapes(config)

        def load(names: Sequence[str]) -> dict[str, Tensor]:
            found = self.load([name for name in names if name not in new])
            return {name: found[name] if name in found else torch.zeros(new[name]) for name in names}

        return replace(self, config=config, shapes=kept | new, load=load, class_names=None)

    def _at_image_size(self, image_size: int, interpolation: Interpolation) -> "Pretrained":
        config = _changed(self.config, "image_size", image_size)
        if config.pos_embed == "relative":
            raise UserError(
                f"{self.where} has relative positions ('blocks.0.attn.rel_pos_embed' and its like), of distances "
                f"between tokens that are row after row: images of {image_size} pixels have rows of another length "
                f"than those of {self.config.image_size}, so these vectors cannot be resampled"
            )
        shape = resolve_shape(config)
        if not shape.is_transformer:  # no parameter depends on the image
            return replace(self, config=config)
        class_tokens = shape.positions - shape.patches
        side = image_size // shape.patch_size
        tables = table_shapes(config, shape)

        def load(names: Sequence[str]) -> dict[str, Tensor]:
            found = self.load(names)
            for name in tables.keys() & found.keys():
                table = found[name]
                if config.pos_embed == "sincos_2d":
                    found[name] = sincos_positions(shape)
                elif name == "pos_embed":
                    found[name] = resample_positions(
                        table, side, class_tokens=class_tokens, interpolation=interpolation
                    )
                else:
                    found[name] = resample_axis(table, side, interpolation)
            return found

        return replace(self, config=config, shapes={**self.shapes, **tables}, load=load)


def check_readable(path: Path) -> None:
    """Raises UserError unless a file can be opened. Libraries call one without permission absent or damaged."""
    try:
        with open(path, "rb"):
            pass
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder, and by its name it must be a file") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): make it readable") from error


def from_entries(
    where: str,
    config: ModelConfig,
    entries: Iterable[Entry],
    fetch: Callable[[str], Tensor],
    pixels: Mapping[str, Any] | None,
    class_names: tuple[str, ...] | None = None,
    *,
    what: str = "tensor",
) -> Pretrained:
    """A model whose parameters are stored under other names and in other layouts. fetch: reads a tensor of theirs.

    what: the word for one of theirs. Reading raises UserError if a number is not finite.
    """
    by_name = {entry.ours: entry for entry in entries}
    shapes = {name: by_name[name].shape for name in parameter_shapes(config)}

    def load(names: Sequence[str]) -> dict[str, Tensor]:
        found = {}
        for name in names:
            entry = by_name[name]
            parts = {theirs: fetch(theirs) for theirs in entry.theirs}
            check_finite(parts, where, what)
            found[name] = entry.to_ours(list(parts.values())).to(torch.float32, copy=True)
        return found

    return Pretrained(where, config, shapes, load, pixels, class_names)


def from_tensors(
    where: str,
    config: ModelConfig,
    found: Mapping[str, Sequence[int]],
    load: Callable[[Sequence[str]], dict[str, Tensor]],
    pixels: Mapping[str, Any] | None,
    class_names: tuple[str, ...] | None = None,
) -> Pretrained:
    """A model whose parameters are stored under our names.

    found: their shapes. Raises UserError if they are not those of `config`; reading does if a number is not finite.
    """
    expected = parameter_shapes(config)
    check_shapes(expected, found, where, "parameter")

    def load_finite(names: Sequence[str]) -> dict[str, Tensor]:
        tensors = load(names)
        check_finite(tensors, where, "parameter")
        return tensors

    return Pretrained(where, config, expected, load_finite, pixels, class_names)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The parameters of a model and their shapes, in the order of its state dict. Cheap, whatever the size."""
    whole = resolve_shape(config)
    with torch.device("meta"):
        first = config.model_copy(update={"depth": 1}) if whole.is_transformer else config
        model = new_model(first, mean=USUAL, std=USUAL)
    shapes: dict[str, tuple[int, ...]] = {}
    one = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    of_block = {name.removeprefix("blocks.0."): shape for name, shape in one.items() if name.startswith("blocks.")}
    for name, shape in one.items():
        if not name.startswith("blocks."):
            shapes[name] = shape
        elif "blocks.0.norm1.weight" not in shapes:
            blocks = range(whole.depth)
            shapes |= {f"blocks.{index}.{inner}": size for index in blocks for inner, size in of_block.items()}
    return shapes | (table_shapes(config, whole) if whole.is_transformer else {})  # of every layer, perhaps


def head_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The parameters of the linear head, the weight first; none if there is no head."""
    shape, classes = resolve_shape(config), config.num_classes
    if classes == 0:
        return {}
    if shape.is_transformer:
        return {"head.weight": (classes, shape.width), "head.bias": (classes,)}
    return {"head.fc.weight": (classes, shape.width, 1, 1), "head.fc.bias": (classes,)}


def model_config(model: Mapping[str, Any], where: str) -> ModelConfig:
    """The section `model` from its JSON. Raises UserError if this version does not know the model in `where`."""
    try:
        return ModelConfig.model_validate(model)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise UserError(
            f"{where} is of a model that this version does not know (model.{key}: {problem['msg']})"
        ) from error


def _changed(config: ModelConfig, key: str, value: int, **others: Any) -> ModelConfig:
    try:
        changed = ModelConfig.model_validate({**config.model_dump(), key: value, **others})
    except ValidationError as error:
        raise UserError(f"{key} is {value}: {error.errors()[0]['msg'].lower()}") from error
    resolve_shape(changed)
    return changed
