"""Learning the labels: cross-entropy of images that are augmented and mixed on the device."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit_engine.config import Config
from fastvit_engine.config.model_shape import resolve_shape
from fastvit_engine.config.timm_model import is_timm
from fastvit_engine.data import Batch
from fastvit_engine.data.pixels.mix import mix
from fastvit_engine.data.stream.batch import targets
from fastvit_engine.objectives.augmented import augmented_images, augmented_packed
from fastvit_engine.packed_image import read_grids
from fastvit_kernels import FusedCrossEntropy


class Classify:
    """Softmax or sigmoid cross-entropy of the labels, with RandAugment, mixup, CutMix and label smoothing."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.augment, self.pixels, self.device = config.augment, config.data, device
        self.patch_size = resolve_shape(config.model).patch_size if config.packing.on else None
        self.criterion = FusedCrossEntropy(config.loss.kind, label_smoothing=config.loss.label_smoothing)
        # The same but for rounding, which batch normalisation multiplies: so a run learns to the bit what a loop of
        # PyTorch's own functions learns around the same model.
        is_plain = config.loss.kind == "softmax" and config.loss.label_smoothing == 0
        self.as_pytorch = is_plain and is_timm(config.model) and device.type == "cpu"

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of each sample, [B]; 0 for a sample of weight 0, and for one mixed with it."""
        labels = batch.labels.to(self.device, non_blocking=True)
        weights = batch.weights.to(self.device, non_blocking=True)
        augment, pixels = self.augment, self.pixels
        if self.patch_size is None:
            images = augmented_images(batch, augment, self.device)  # the patch embedding normalises them
        else:
            grids = read_grids(batch.images)  # on the host: a GPU is not waited for
            images = augmented_packed(batch, grids, self.patch_size, augment, self.device)
        if augment.mixup or augment.cutmix:
            alphas = {"mixup": augment.mixup, "cutmix": augment.cutmix}
            mixed = mix(images, labels, batch.seeds, **alphas, mean=pixels.mean, std=pixels.std)
            logits = model(mixed.images)
            labels, labels_b = (targets(given, logits.shape[1]) for given in (labels, mixed.labels_b))
            losses = self.criterion(logits, labels, labels_b=labels_b, mix_weight=mixed.weight, reduction="none")
            weights = weights * weights[mixed.partner]
        else:
            logits = model(images) if self.patch_size is None else model(images, grids=grids)
            labels = targets(labels, logits.shape[1])
            if self.as_pytorch and labels.ndim == 1:
                losses = F.cross_entropy(logits.float(), labels, reduction="none")
            else:
                losses = self.criterion(logits, labels, reduction="none")
        return losses * weights
