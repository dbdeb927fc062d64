"""The loss of an objective without labels on held-out images, each counted exactly once."""

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fastvit_engine.data import Batch
from fastvit_engine.distributed.world import World
from fastvit_engine.evaluate.pictures import png_url
from fastvit_engine.objectives import Objective
from fastvit_engine.observe.metrics import LossRow

PICTURES = 12  # that are kept of an evaluation
Picture = dict[str, str]  # key, image


class HeldOutLoss:
    """The evaluator of `data.eval` in training without labels.

    batches: begins a pass over the images, the same number of batches on every process. objective: draws what is random
    from the seeds of the samples, which in evaluation are their positions: an image always has the same patches hidden.
    If it has a method `pictures`, as masked autoencoding has, `on_pictures` gets those of the first batch.
    """

    name = "eval"

    def __init__(
        self,
        batches: Callable[[], Iterable[Batch]],
        objective: Objective,
        world: World,
        *,
        every_steps: int,
        on_pictures: Callable[[int, str, list[Picture]], None] | None = None,
    ) -> None:
        """`on_pictures` takes the step, the name of the row, and pictures of images of this process."""
        self.batches, self.objective, self.world, self.every_steps = batches, objective, world, every_steps
        self.on_pictures = on_pictures

    def run(self, model: nn.Module, *, step: int, name: str) -> list[LossRow]:
        started = time.perf_counter()
        loss, samples, pictures = self._measure(model)
        if pictures and self.on_pictures is not None:
            self.on_pictures(step, name, pictures)
        return [
            {"step": step, "eval": name, "loss": loss, "samples": samples, "seconds": time.perf_counter() - started}
        ]

    @torch.no_grad()
    def _measure(self, model: nn.Module) -> tuple[float, int, list[Picture]]:
        """The mean over the images of all processes, their number, and pictures of the first of this process."""
        was_training = model.training
        model.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.world.device)  # loss, samples
        draw = getattr(self.objective, "pictures", None)
        pictures: list[Picture] = []
        try:
            for batch in self.batches():
                if draw is not None:  # on every process: parameters may be sharded
                    pictures, draw = _pictures(batch, draw(model, batch)), None
                losses = self.objective.losses(model, batch)  # 0 for padding
                totals += torch.stack([losses.sum(), batch.weights.to(losses.device).sum()])
        finally:
            model.train(was_training)
        loss, samples = self.world.sum(totals).tolist()
        return loss / samples, round(samples), pictures


def _pictures(batch: Batch, drawn: Tensor) -> list[Picture]:
    usable = [row for row in range(len(batch.keys)) if batch.weights[row] > 0]
    return [{"key": batch.keys[row], "image": png_url(drawn[row])} for row in usable[:PICTURES]]
