"""Top-1 and top-5 accuracy and loss over a labelled set, each image counted exactly once.

An image with several labels counts as a hit if the predicted class is any of them.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastvit_engine.data import Batch
from fastvit_engine.data.stream.batch import targets
from fastvit_engine.distributed.world import World
from fastvit_engine.evaluate.pictures import png_url
from fastvit_engine.evaluate.record import Integers
from fastvit_engine.observe.metrics import EvalRow
from fastvit_engine.packed_image import pixels_of
from fastvit_kernels import FusedCrossEntropy

Example = dict[str, Any]  # an image and what the model says of it: key, label, image, predictions


@dataclass(frozen=True)
class Accuracy:
    """What `evaluate` measures."""

    top1: float  # share of images, 0 to 1
    top5: float | None  # likewise; None with five classes or fewer
    loss: float  # mean over images
    samples: int


class Answers(NamedTuple):
    """What the model says of each image."""

    right: Integers  # [N, G] labels, filled up with -1
    ranked: Integers  # [N, up to 5] outputs by score
    examples: list[Example]  # of the first images of this process


class Classification:
    """The evaluator of `data.eval`.

    batches: begins a pass over the images, the same number of batches on every process. shown: of how many images of
    this process `on_answers` gets what the model says.
    """

    name = "eval"

    def __init__(
        self,
        batches: Callable[[], Iterable[Batch]],
        criterion: FusedCrossEntropy,
        world: World,
        *,
        every_steps: int,
        shown: int = 0,
        on_answers: Callable[[int, str, Answers], None] | None = None,
    ) -> None:
        """`on_answers` takes the step, the name of the row, and the answers of all processes."""
        self.batches, self.criterion, self.world, self.every_steps = batches, criterion, world, every_steps
        self.shown, self.on_answers = shown, on_answers

    def run(self, model: nn.Module, *, step: int, name: str) -> list[EvalRow]:
        started = time.perf_counter()
        accuracy, answers = evaluate(model, self.batches(), self.criterion, self.world, shown=self.shown)
        seconds = time.perf_counter() - started
        parts = self.world.gather(answers._replace(examples=[]))
        if self.on_answers is not None:
            right, ranked = (np.concatenate([part[column] for part in parts]) for column in (0, 1))
            self.on_answers(step, name, Answers(right, ranked, answers.examples))
        return [
            {
                "step": step,
                "eval": name,
                "top1": accuracy.top1,
                "top5": accuracy.top5,
                "loss": accuracy.loss,
                "samples": accuracy.samples,
                "seconds": seconds,
            }
        ]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    criterion: nn.Module,
    world: World | None = None,
    *,
    shown: int = 0,
) -> tuple[Accuracy, Answers]:
    """Measures a model over all processes of `world`; None: this process alone.

    Collective, and every process must get the same number of batches. Also returns the answers for the images of this
    process, with the first `shown` as examples.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device if world is None else world.device
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # top-1, top-5, loss, samples
    answers: list[tuple[Tensor, Tensor, Tensor]] = []
    examples: list[Example] = []
    try:
        for batch in batches:
            images = batch.images.to(device, non_blocking=True)
            labels = batch.labels.to(device, non_blocking=True)
            weights = batch.weights.to(device, non_blocking=True)  # 0 marks padding
            logits = model(images).float()
            ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [B, 5]
            hits = (ranked[:, :, None] == labels.view(len(labels), 1, -1)).any(dim=2)  # [B, 5]
            losses = criterion(logits, targets(labels, logits.shape[1]), reduction="none")
            totals += torch.stack(
                [(hits[:, 0] * weights).sum(), (hits.any(1) * weights).sum(), (losses * weights).sum(), weights.sum()]
            )
            answers.append((weights > 0, labels.view(len(labels), -1), ranked))
            if len(examples) < shown:
                examples += _examples(batch, logits, ranked)[: shown - len(examples)]
    finally:  # also if the data turns out to be unusable
        model.train(was_training)
    top1, top5, loss, samples = (totals if world is None else world.sum(totals)).tolist()
    has_top5 = logits.shape[1] > 5
    counted, right, outputs = (torch.cat(parts).cpu() for parts in zip(*answers, strict=True))
    return (
        Accuracy(top1 / samples, top5 / samples if has_top5 else None, loss / samples, round(samples)),
        Answers(right[counted].numpy(), outputs[counted].numpy(), examples),
    )


def _examples(batch: Batch, logits: Tensor, ranked: Tensor) -> list[Example]:
    probabilities = logits.softmax(1).gather(1, ranked).tolist()
    return [
        {
            "key": batch.keys[row],
            "label": int(batch.labels[row].flatten()[0]),
            "image": png_url(pixels_of(batch.images[row])),
            "predictions": [
                [index, round(p, 6)] for index, p in zip(ranked[row].tolist(), probabilities[row], strict=True)
            ],
        }
        for row in range(len(batch.keys))
        if batch.weights[row] > 0
    ]
