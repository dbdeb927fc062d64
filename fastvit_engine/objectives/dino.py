"""Self-distillation without labels: the objective of DINO (Caron et al. 2021, arXiv:2104.14294)."""

from typing import cast

import torch
from torch import Tensor, nn

from fastvit_engine.config import Config
from fastvit_engine.data import Batch
from fastvit_engine.data.pixels.views import distort_views, training_views, unpack_views
from fastvit_engine.models.self_distilled import SelfDistilled
from fastvit_engine.objectives.protocol import Average
from fastvit_kernels import FusedCrossEntropy

_LARGE = 2  # views that the teacher sees, too


class SelfDistillation:
    """Cross-entropy of the student's prototypes for each view with the teacher's for the other large views.

    The teacher is the model with the moving average of its weights. Its scores are centred, by a moving mean, and
    sharpened, by a low temperature, so that neither one prototype nor all of them alike is an answer. Labels are not
    read.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.settings, self.views, self.device = config.dino, training_views(config), device
        self.criterion = FusedCrossEntropy()
        self.average: Average | None = None

    def learn_from(self, average: Average) -> None:
        """Begins to train, or begins again after going back to a checkpoint."""
        self.average = average
        self._scores = torch.zeros(self.settings.prototypes + 1, device=self.device)  # summed, and how many they are

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over all pairs of views of each sample, float32 [B]; 0 for a sample of weight 0."""
        packed = batch.images.to(self.device, non_blocking=True)
        weights = batch.weights.to(self.device, non_blocking=True)
        views = distort_views(unpack_views(packed, self.views), self.views, batch.seeds)
        large, small = torch.cat(views[:_LARGE]), views[_LARGE:]  # [2 B, S, S, 3]
        first, second = self._teach(model, large, weights).chunk(_LARGE)  # [B, K]
        scores = model(large, *([torch.cat(small)] if small else ()), project=True)  # [V B, K]
        # Both teachers of a small view at once: cross-entropy is linear in the target.
        targets = torch.cat([second, first, *([(first + second) / 2] * len(small))])
        losses = self.criterion(scores / self.settings.student_temperature, targets, reduction="none")
        of_view = losses.view(len(views), -1)  # [V, B]
        pairs = 2 + 2 * len(small)
        return (of_view[:_LARGE].sum(0) + 2 * of_view[_LARGE:].sum(0)) / pairs * weights

    @torch.no_grad()
    def step_done(self, model: nn.Module) -> None:
        """Moves the centre towards the mean of the teacher's scores in this step, over all processes; collective."""
        assert self.average is not None
        total = self.average.add_up(self._scores)
        centre, momentum = self._module(model).centre, self.settings.centre_momentum
        centre.lerp_(total[:-1] / total[-1].clamp(min=1), 1 - momentum)
        self._scores.zero_()

    @torch.no_grad()
    def _teach(self, model: nn.Module, images: Tensor, weights: Tensor) -> Tensor:
        """The teacher's distribution over the prototypes for each image, float32 [2 B, K]."""
        assert self.average is not None
        was_training = model.training
        with self.average.applied():
            model.eval()
            scores = model(images, project=True).float()
            model.train(was_training)
        counted = weights.repeat(_LARGE)
        self._scores[:-1] += counted @ scores
        self._scores[-1] += counted.sum()
        return ((scores - self._module(model).centre) / self.settings.teacher_temperature).softmax(dim=1)

    @staticmethod
    def _module(model: nn.Module) -> SelfDistilled:
        return cast(SelfDistilled, getattr(model, "module", model))  # what an engine has wrapped
