"""Few-shot accuracy while a model trains: the processes share the images, and then the classifiers."""

import math
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from torch import nn

from fastvit_engine.data import Batch
from fastvit_engine.distributed.world import World
from fastvit_engine.evaluate.features import Features, extract_features
from fastvit_engine.evaluate.fewshot import L2, SEEDS, Task, classes_of, few_shot_accuracy, summarize, tasks
from fastvit_engine.observe.metrics import FewShotRow


class FewShot:
    """The evaluator of `evaluate.fewshot`. Its rows have the figures of `fastvit fewshot` for the same weights.

    train, evaluation: each begins a pass over the images, the same number of batches on every process. marked: passes
    the classifiers through, each being progress.
    """

    name = "fewshot"

    def __init__(
        self,
        train: Callable[[], Iterable[Batch]],
        evaluation: Callable[[], Iterable[Batch]],
        shots: Sequence[int],
        world: World,
        *,
        every_steps: int,
        marked: Callable[[Iterable[Task]], Iterable[Task]] = iter,
    ) -> None:
        self.train, self.evaluation, self.shots = train, evaluation, sorted(set(shots))
        self.world, self.every_steps, self.marked = world, every_steps, marked

    def run(self, model: nn.Module, *, step: int, name: str) -> list[FewShotRow]:
        started = time.perf_counter()
        train = extract_features(model, self.train(), self.world)
        evaluation = extract_features(model, self.evaluation(), self.world)
        own = tasks(self.shots, SEEDS)[self.world.rank :: self.world.size]
        fitted = [(task, _accuracy(task, train, evaluation)) for task in self.marked(own)]
        accuracies = [found for of_rank in self.world.gather(fitted) for found in of_rank]
        return [
            {
                "step": step,
                "eval": name,
                "shots": summarize(accuracies),
                "l2": L2,
                "samples": len(evaluation.labels),
                "seconds": time.perf_counter() - started,
            }
        ]


def _accuracy(task: Task, train: Features, evaluation: Features) -> float:
    """NaN if the weights are broken: the step after this one finds that out, and says what is wrong."""
    if not all(np.isfinite(part.features).all() for part in (train, evaluation)):
        return math.nan
    return few_shot_accuracy(
        train.features,
        train.labels,
        evaluation.features,
        evaluation.labels,
        num_classes=classes_of(train.labels, evaluation.labels),
        **task._asdict(),
    )
