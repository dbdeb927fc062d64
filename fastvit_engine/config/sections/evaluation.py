"""What is measured while a model trains."""

from typing import Annotated

from pydantic import Field

from fastvit_engine.config.sections.base import MOST_SAMPLES, Section
from fastvit_engine.duration import Duration

Shots = Annotated[int, Field(gt=0, le=1_000_000)]


class FewShotConfig(Section):
    """Few-shot accuracy during training: a linear classifier on the model's features, as `fastvit fewshot` has it."""

    train: str | None = None
    """Shards whose images the classifiers are fitted to: a folder, a glob, a brace pattern or an index; null: no
    few-shot evaluation. Their classes need not be those of data.train."""

    eval: str | None = None
    """Shards of the same classes on which the classifiers are measured."""

    shots: tuple[Shots, ...] = Field((1, 5, 10, 25), min_length=1)
    """Numbers of images per class. Each is repeated with three choices of images."""

    every: Duration | None = None
    """Interval between few-shot evaluations; null: only at the end of the run, where one is always made. With
    optimizer.frozen: backbone, whose features stay the same, only there."""


class EvaluateConfig(Section):
    """Evaluation during training on the shards of data.eval."""

    every: Duration | None = None
    """Interval between evaluations; null: only at the end of the run, where one is always made."""

    batch_size: int | None = Field(None, gt=0, le=MOST_SAMPLES)
    """Images per process and forward pass; null: the training micro-batch."""

    fewshot: FewShotConfig = FewShotConfig()
