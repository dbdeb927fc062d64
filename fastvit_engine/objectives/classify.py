"""Learning the labels: cross-entropy of images that are augmented and mixed on the device."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit_engine.config import Config
from fastvit_engine.config.model_shape import resolve_shape, visible_patches
from fastvit_engine.config.phases import Phase
from fastvit_engine.config.timm_model import is_timm
from fastvit_engine.data import Batch
from fastvit_engine.data.pixels.draws import on_device
from fastvit_engine.data.pixels.mix import mix
from fastvit_engine.data.stream.batch import targets
from fastvit_engine.objectives.augmented import augmented_images, augmented_packed
from fastvit_engine.objectives.masks import draw_visible
from fastvit_engine.packed_image import read_grids
from fastvit_kernels import FusedCrossEntropy


class Classify:
    """Softmax or sigmoid cross-entropy of the labels, with RandAugment, mixup, CutMix and label smoothing."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.augment, self.pixels, self.device = config.augment, config.data, device
        self.packed_patch_size = resolve_shape(config.model).patch_size if config.packing.on else None
        self.criterion = FusedCrossEntropy(config.loss.kind, label_smoothing=config.loss.label_smoothing)
        # The same but for rounding, which batch normalisation multiplies: so a run learns to the bit what a loop of
        # PyTorch's own functions learns around the same model.
        is_plain = config.loss.kind == "softmax" and config.loss.label_smoothing == 0
        self.as_pytorch = is_plain and is_timm(config.model) and device.type == "cpu"
        self.patch_size = resolve_shape(config.model).patch_size if config.tokens.patch_drop else None
        self.patch_drop = 0.0  # of the phase of the run

    def enter_phase(self, phase: Phase) -> None:
        """From now on the model sees what this phase shows to it, see section `tokens`."""
        self.patch_drop = phase.patch_drop

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of each sample, [B]; 0 for a sample of weight 0, and for one mixed with it."""
        labels = batch.labels.to(self.device, non_blocking=True)
        weights = batch.weights.to(self.device, non_blocking=True)
        augment, pixels = self.augment, self.pixels
        packed = self.packed_patch_size
        if packed is None:
            images, grids = augmented_images(batch, augment, self.device), None  # the patch embedding normalises them
        else:
            grids = read_grids(batch.images)  # on the host: a GPU is not waited for
            images = augmented_packed(batch, grids, packed, augment, self.device)
        shown = self._shown_patches(batch)
        if augment.mixup or augment.cutmix:
            alphas = {"mixup": augment.mixup, "cutmix": augment.cutmix}
            mixed = mix(images, labels, batch.seeds, **alphas, mean=pixels.mean, std=pixels.std)
            logits = model(mixed.images, *shown)
            labels, labels_b = (targets(given, logits.shape[1]) for given in (labels, mixed.labels_b))
            losses = self.criterion(logits, labels, labels_b=labels_b, mix_weight=mixed.weight, reduction="none")
            weights = weights * weights[mixed.partner]
        else:
            logits = model(images, *shown) if grids is None else model(images, grids=grids)
            labels = targets(labels, logits.shape[1])
            if self.as_pytorch and labels.ndim == 1:
                losses = F.cross_entropy(logits.float(), labels, reduction="none")
            else:
                losses = self.criterion(logits, labels, reduction="none")
        return losses * weights

    def _shown_patches(self, batch: Batch) -> tuple[Tensor, ...]:
        """The patches that the model sees of each image, int64 [B, K], drawn from its seed; nothing: all."""
        if self.patch_drop == 0 or self.patch_size is None:
            return ()
        patches = (batch.images.shape[1] // self.patch_size) ** 2
        drawn = draw_visible(batch.seeds, patches, visible_patches(patches, self.patch_drop))
        return (on_device(drawn, self.device),)
