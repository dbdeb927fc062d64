"""Any model of timm as a model of this engine: timm's own module, under its own parameter names."""

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastvit_engine.config import EvalTransform, ModelConfig
from fastvit_engine.errors import UserError
from fastvit_engine.models.running_statistics import (
    BatchNormOfAllProcesses,
    keep_float32,
    layers_with_statistics,
    processes,
    snapshot,
    statistics_of,
)
from fastvit_engine.models.timm_library import can_represent, classifier_parameters, create
from fastvit_kernels import accelerate
from fastvit_kernels.mlp.op import Recompute
from fastvit_kernels.patch_embed.reference import normalise


class TimmModel(nn.Module):
    """What a class of timm's gets in front of it: `build_timm` makes a class of both.

    Images are uint8 [B, H, W, 3] or [B, 3, H, W], normalised inside with `mean` and `std` of pixels in [0, 1], or
    floating [B, 3, H, W] that already are. Parameters, buffers and modules are timm's.
    """

    backbone_frozen = False  # by `freeze_backbone`
    eval_crop: float | None = None  # how evaluation crops images, as of VisionTransformer
    eval_transform: EvalTransform | None = None
    class_names: tuple[str, ...] | None = None  # in the order of the outputs; None: not known

    # Set by `build_timm`.
    config: ModelConfig
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    of_classifier: frozenset[str]  # names of parameters
    running_statistics: frozenset[str]  # names of buffers that an average of the weights averages too
    statistics_layers: list[nn.Module]  # that keep running statistics
    accelerated: str  # how many modules run fused operations, and by whom

    def forward(self, images: Tensor, represent: bool = False) -> Tensor:
        """Logits [B, C]; with `represent`, what `represent` returns."""
        pixels = self._pixels(images)
        with self._batch_norm():
            if represent:
                return self._represented(pixels)
            logits = super().forward(pixels)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            shape = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else f"the type {type(logits).__name__}"
            raise UserError(
                f"{self.config.name} returns an output of {shape} in training, where logits [B, C] are needed: give "
                "it the arguments (model.timm) that make it a classifier"
            )
        return logits

    def forward_features(self, images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """timm's features, in the layout of the model; images as `forward` takes them."""
        features: Tensor = super().forward_features(self._pixels(images), *args, **kwargs)  # type: ignore[misc]
        return features

    def represent(self, images: Tensor) -> Tensor:
        """What the classifier sees of images [B, R]: timm's `forward_features`, then `forward_head` up to there."""
        return self(images, represent=True)

    def _represented(self, pixels: Tensor) -> Tensor:
        if not can_represent(self):
            raise UserError(
                f"{self.config.name} has no forward_features and forward_head(x, pre_logits=True), which give its "
                "representation: add them to the model, or measure its accuracy with its head"
            )
        this: Any = self
        represented = this.forward_head(this.forward_features(pixels), pre_logits=True)
        parts = represented if isinstance(represented, tuple | list) else [represented]  # of several branches
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def _pixels(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in the dtype of the parameters."""
        dtype = next(self.parameters()).dtype
        if images.dtype == torch.uint8:
            if images.ndim != 4 or (images.shape[1] == 3) == (images.shape[3] == 3):
                raise ValueError(f"uint8 images must be [B, H, W, 3] or [B, 3, H, W], got {list(images.shape)}")
            images = images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
            images = normalise(images, self.pixel_mean, self.pixel_std)
        return images if torch.is_autocast_enabled(images.device.type) else images.to(dtype)

    def _batch_norm(self) -> AbstractContextManager[Any]:
        """Nothing for models without running statistics, and where PyTorch itself does what the rule says."""
        if not self.statistics_layers or (processes() == 1 and next(self.parameters()).dtype == torch.float32):
            return nullcontext()
        return BatchNormOfAllProcesses()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TimmModel":
        before = snapshot(self.statistics_layers)
        super()._apply(fn, recurse)
        keep_float32(self.statistics_layers, before)
        return self

    def round_buffers(self, dtype: torch.dtype) -> None:
        """Gives floating buffers the number format that the model computes in, but for running statistics.

        DeepSpeed converts parameters alone, and layers add such buffers to them: masks, tables, biases that are zero.
        """
        exact = {id(module) for module in self.statistics_layers}
        for module in self.modules():
            for name, buffer in module._buffers.items():
                if id(module) not in exact and buffer is not None and buffer.is_floating_point():
                    module._buffers[name] = buffer.to(dtype)

    def layers_of_parameters(self) -> dict[str, int]:
        """The layer of each parameter as timm counts them, 0 for the embeddings; the last has the classifier.

        Raises UserError if the model does not say what its layers are.
        """
        matcher = getattr(self, "group_matcher", None)
        if not callable(matcher):
            raise UserError(
                f"optimizer.layer_decay needs the layers of {self.config.name}, which has no group_matcher() that says "
                "them: set optimizer.layer_decay=null"
            )
        group = importlib.import_module("timm.models").group_parameters
        found: dict[str, int] = group(self, matcher(coarse=False), reverse=True)
        return found

    def recompute(self, mode: Recompute) -> None:
        """Has no effect: the blocks are timm's."""

    def freeze_backbone(self) -> None:
        """From now on only the classifier learns: all else gets no gradient, and computes as in evaluation.

        Raises UserError if the model does not say what its classifier is.
        """
        if not self.of_classifier:
            raise UserError(
                f"optimizer.frozen = backbone leaves the classifier to learn, and {self.config.name} has none that "
                "get_classifier() returns: set optimizer.frozen=none"
            )
        self.backbone_frozen = True
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in self.of_classifier)
        self.train(self.training)

    def train(self, mode: bool = True) -> "TimmModel":
        super().train(mode)
        if self.backbone_frozen and mode:
            learning = {name.rpartition(".")[0] for name in self.of_classifier}
            for name, module in self.named_modules():
                module.training = name in learning or name == ""
        return self


_classes: dict[Any, type[TimmModel]] = {}


def _class_of(timms: Any) -> type[TimmModel]:
    """A class of ours and of timm's together, always the same."""
    if timms not in _classes:
        _classes[timms] = type(timms.__name__, (TimmModel, timms), {"__module__": __name__})
    return _classes[timms]


def build_timm(config: ModelConfig, *, mean: Sequence[float], std: Sequence[float], **more: Any) -> TimmModel:
    """The model that `model.name: timm/...` names, initialised by timm, in float32.

    On the CPU its weights are those of `timm.create_model` after the same `torch.manual_seed`. Modules that
    `fastvit_kernels.accelerate` knows run as fused operations. more: further arguments of `create_model`.

    Raises UserError if timm is missing or makes no such model.
    """
    model: Any = create(config, **more)
    table = accelerate(model)
    model.__class__ = _class_of(type(model))
    model.config = config
    model.pixel_mean, model.pixel_std = tuple(mean), tuple(std)
    model.of_classifier = classifier_parameters(model)
    model.running_statistics = statistics_of(model)
    model.statistics_layers = layers_with_statistics(model)
    model.accelerated = str(table).rpartition("\n")[2]
    if config.head_bias:
        _set_head_bias(model, config.head_bias)
    return model


@torch.no_grad()
def _set_head_bias(model: TimmModel, value: float) -> None:
    biases = [p for name, p in model.named_parameters() if name in model.of_classifier and name.endswith("bias")]
    if not biases:
        raise UserError(
            f"model.head_bias = {value:g}, and the classifier of {model.config.name} has no bias: leave it out"
        )
    for bias in biases:
        bias.fill_(value)


@torch.no_grad()
def clear_head(model: TimmModel) -> None:
    """Makes the linear layers of the classifier zero, as a new head is."""
    for name in model.of_classifier:
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, nn.Linear | nn.Conv2d):
            model.get_parameter(name).zero_()
