"""What the engine needs of training data, whichever way it is read.

Three implementations: `indexed` (shards read by position, in an exact order), `streams` (shards that can only be read
from beginning to end) and `iterable` (an iterable of the user's own).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fastvit_engine.config import Config, DataConfig
from fastvit_engine.data.stream.batch import Batch
from fastvit_engine.data.stream.order import Integers
from fastvit_engine.data.stream.skip import Window
from fastvit_engine.errors import UserError


class EvaluationData(ABC):
    """Shards to evaluate on."""

    @abstractmethod
    def eval_batches(
        self, config: Config, *, rank: int, world_size: int, batch_size: int, pin_memory: bool
    ) -> Iterator[Batch]:
        """One pass over the shards: each sample once over all ranks, in equally many equal batches per rank.

        Batches are padded with weight 0. Raises UserError.
        """


class TrainingData(EvaluationData):
    """Training and evaluation images of a run. The main process makes it and sends it to the others, pickled."""

    samples_per_epoch: int | None  # None if nobody has counted them
    class_names: list[str] | None  # in the order of the labels, if they are known

    @abstractmethod
    def fingerprint(self, data: DataConfig) -> dict[str, Any]:
        """What the order depends on besides the seed. A checkpoint keeps it; a run resumes only if it is the same."""

    @abstractmethod
    def describe(self) -> str:
        """What is read and how, as a clause for the first line of a run."""

    def bind(self, own: "TrainingData | None") -> "TrainingData":
        """The same, with what does not travel from the main process: `own`, if this process was given its own data."""
        return self

    @abstractmethod
    def train_batches(
        self,
        config: Config,
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        consumed: int,
        pin_memory: bool,
        node_ranks: Sequence[int] = (),
        skipped: Sequence[Window] = (),
    ) -> Iterator[Batch]:
        """Endless micro-batches of this rank, from position `consumed` of the run on, without the windows `skipped`.

        A step takes train.global_batch_size / world_size images from each rank. `node_ranks`: all ranks of this node,
        for the one of them that announces to the storage of remote shards what will be read. Raises UserError.
        """


def check_micro_batch(config: Config, world_size: int, micro_batch_size: int) -> None:
    """Raises UserError unless each rank's share of the global batch is whole micro-batches."""
    share = config.train.global_batch_size // world_size
    if share % micro_batch_size:
        raise UserError(
            f"the micro-batch of {micro_batch_size} images does not divide the {share} images that each of "
            f"{world_size} ranks takes per step: change train.micro_batch_size or train.global_batch_size"
        )


def rank_positions(batch: int, rank: int, world_size: int) -> Integers:
    """The positions within a global batch that belong to a rank: every world_size-th pair of neighbours.

    In pairs, because images are mixed in pairs: so the world size does not change which images are mixed. Single
    positions if a rank has an odd number of them.
    """
    size = 2 if batch // world_size % 2 == 0 else 1
    return np.arange(batch).reshape(-1, size)[rank::world_size].ravel()
