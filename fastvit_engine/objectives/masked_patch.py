"""Predicting corrupted patches: masked patch prediction (Dosovitskiy et al. 2021, appendix B.1.2)."""

import torch
from torch import Tensor, nn

from fastvit_engine.config import Config
from fastvit_engine.config.model_shape import COLOURS, resolve_shape
from fastvit_engine.data import Batch
from fastvit_engine.objectives.augmented import augmented_images
from fastvit_engine.objectives.masks import draw_corruption
from fastvit_engine.objectives.targets import masked_patch_targets, patch_pixels
from fastvit_kernels import FusedCrossEntropy
from fastvit_kernels.patch_embed.reference import normalise


class MaskedPatchPrediction:
    """Cross-entropy of the mean colours of corrupted patches; or the squared error of their pixels. Reads no labels."""

    def __init__(self, config: Config, device: torch.device) -> None:
        shape = resolve_shape(config.model)
        self.settings, self.patch_size, self.patches = config.masked_patch, shape.patch_size, shape.patches
        self.augment, self.pixels, self.device = config.augment, config.data, device
        self.criterion = FusedCrossEntropy()

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over the chosen patches of each sample, float32 [B]; 0 for a sample of weight 0.

        model: a MaskedPatchPredictor. The sample's seed says which patches are chosen, and what happens to each.
        """
        images = augmented_images(batch, self.augment, self.device)
        weights = batch.weights.to(self.device, non_blocking=True)
        corruption = draw_corruption(batch.seeds, self.patches, self.settings.ratio, self.device)
        predictions = model(images, *corruption)  # [B, M, outputs]
        return self._losses(predictions, images, corruption.chosen) * weights

    def _losses(self, predictions: Tensor, images: Tensor, chosen: Tensor) -> Tensor:
        target = self.settings.target
        if target == "pixels":
            pixels = normalise(images.permute(0, 3, 1, 2), self.pixels.mean, self.pixels.std)
            targets = patch_pixels(pixels, self.patch_size).take_along_dim(chosen[..., None], dim=1)
            return (predictions.float() - targets).square().mean(dim=(1, 2))
        colours = masked_patch_targets(images, self.patch_size, target)
        colours = colours.gather(1, chosen) if target == "mean" else colours.take_along_dim(chosen[..., None], dim=1)
        losses: Tensor = self.criterion(predictions.reshape(-1, COLOURS), colours.flatten(), reduction="none")
        return losses.unflatten(0, (len(images), -1)).mean(dim=1)
