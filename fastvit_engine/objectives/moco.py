"""Telling images apart by two views of each: the objective of MoCo v3 (Chen et al. 2021, arXiv:2104.02057)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit_engine.config import Config
from fastvit_engine.data import Batch
from fastvit_engine.data.pixels.views import distort_views, training_views, unpack_views
from fastvit_engine.objectives.protocol import Average


class MomentumContrast:
    """Cross-entropy of finding, among all images of a step, the one that the other view is of.

    The teacher, the model with the moving average of its weights, projects both views of every image: these are the
    keys, of all processes. For each view the student predicts the key of the other view. Labels are not read.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.temperature, self.views, self.device = config.moco.temperature, training_views(config), device
        self.average: Average | None = None

    def learn_from(self, average: Average) -> None:
        """Begins to train, or begins again after going back to a checkpoint."""
        self.average = average

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """2 t times the cross-entropy at temperature t, summed over both views: float32 [B]; 0 for weight 0."""
        assert self.average is not None
        packed = batch.images.to(self.device, non_blocking=True)
        weights = batch.weights.to(self.device, non_blocking=True)
        images = torch.cat(distort_views(unpack_views(packed, self.views), self.views, batch.seeds))  # [2 B, S, S, 3]
        keys, own, others = self._teach(model, images, weights)
        queries = model(images, counted=weights, add_up=self.average.add_up, predict=True)  # [2, B, K]
        scores = queries @ keys.flip(0).transpose(1, 2) / self.temperature  # [2, B, N]: keys are of the other view
        scores = scores.masked_fill(~others, -torch.inf)
        losses = F.cross_entropy(scores.flatten(0, 1), own.repeat(len(keys)), reduction="none").view(len(keys), -1)
        return 2 * self.temperature * losses.sum(0) * weights

    def step_done(self, model: nn.Module) -> None:
        """The teacher has no state of its own."""

    @torch.no_grad()
    def _teach(self, model: nn.Module, images: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The keys of both views of all N images of the step, float32 [2, N, K]; and to which of them images belong.

        That is, int64 [B], the key of each image of this process; and bool [B, N], which keys it is compared with: its
        own, and those of images of weight 1.
        """
        assert self.average is not None
        was_training = model.training
        with self.average.applied():
            model.eval()
            projected = model(images, counted=weights, add_up=self.average.add_up)  # [2, B, K]
            model.train(was_training)
        gathered, first = self.average.gather(torch.cat([*projected, weights[:, None]], dim=1))  # [N, 2 K + 1]
        own = first + torch.arange(len(weights), device=self.device)
        compared = gathered[:, -1] > 0
        others = compared | (own[:, None] == torch.arange(len(gathered), device=self.device))
        return torch.stack(gathered[:, :-1].chunk(len(projected), dim=1)), own, others
