"""Predicting the pixels of hidden patches: the objective of masked autoencoders (He et al. 2022)."""

import numpy as np
import torch
from torch import Tensor, nn

from fastvit_engine.config import Config
from fastvit_engine.config.model_shape import masked_count, resolve_shape
from fastvit_engine.data import Batch
from fastvit_engine.data.pixels.draws import on_device
from fastvit_engine.objectives.augmented import augmented_images
from fastvit_engine.objectives.masks import draw_order
from fastvit_engine.objectives.targets import join_patches, mae_targets, patch_pixels
from fastvit_kernels.patch_embed.reference import normalise


class MaskedAutoencoding:
    """Mean squared error of the pixels of hidden patches, which are normalised patch by patch. Labels are not read."""

    def __init__(self, config: Config, device: torch.device) -> None:
        shape = resolve_shape(config.model)
        self.patch_size, self.patches = shape.patch_size, shape.patches
        self.masked = masked_count(shape.patches, config.mae.mask_ratio)
        self.augment, self.pixels, self.device = config.augment, config.data, device

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over the hidden pixels of each sample, float32 [B]; 0 for a sample of weight 0.

        model: a MaskedAutoencoder. The sample's seed says which patches are hidden.
        """
        images = augmented_images(batch, self.augment, self.device)
        weights = batch.weights.to(self.device, non_blocking=True)
        predictions, masked = self._predict(model, images, batch.seeds)
        pixels = normalise(images.permute(0, 3, 1, 2), self.pixels.mean, self.pixels.std)
        targets = mae_targets(pixels, self.patch_size).take_along_dim(masked[..., None], dim=1)
        return (predictions - targets).square().mean(dim=(1, 2)) * weights

    @torch.no_grad()
    def pictures(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the model sees of each image, that with the hidden patches as predicted, and the image itself.

        uint8 [B, H, 3 W, 3], side by side. Hidden patches are grey. Predicted pixels have mean 0 and deviation 1, and
        are shown with those of their patch.
        """
        images = batch.images.to(self.device)
        predictions, masked = self._predict(model, images, batch.seeds)
        channels_first = images.permute(0, 3, 1, 2)
        pixels = patch_pixels(normalise(channels_first, self.pixels.mean, self.pixels.std), self.patch_size)
        index = masked[..., None].expand(-1, -1, pixels.shape[2])
        deviation, mean = torch.std_mean(pixels.gather(1, index), dim=-1, keepdim=True)
        predicted = join_patches(pixels.scatter(1, index, predictions * deviation + mean), self.patch_size)
        own_mean, own_std = (torch.tensor(values, device=self.device) for values in (self.pixels.mean, self.pixels.std))
        predicted = ((predicted * own_std + own_mean) * 255).round().clamp(0, 255).to(torch.uint8)
        seen = patch_pixels(channels_first.float(), self.patch_size).scatter(1, index, 128.0)
        return torch.cat([join_patches(seen, self.patch_size).to(torch.uint8), predicted, images], dim=2)

    def _predict(self, model: nn.Module, images: Tensor, seeds: np.ndarray) -> tuple[Tensor, Tensor]:
        """Predictions float32 [B, M, P * P * 3], and the patches int64 [B, M] that they are of."""
        order = on_device(draw_order(seeds, self.patches), self.device)  # int64 [B, N]
        masked, visible = order[:, : self.masked], order[:, self.masked :]
        return model(images, visible, masked).float(), masked
