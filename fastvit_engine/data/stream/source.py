"""What the engine needs of training data, whichever way it is read.

Three implementations: `indexed` (shards read by position, in an exact order), `streams` (shards that can only be read
from beginning to end) and `iterable` (an iterable of the user's own).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastvit_engine.config import Config, DataConfig
from fastvit_engine.data.stream.batch import Batch
from fastvit_engine.data.stream.skip import Window

ImageSizeOf = Callable[[int], int]


class EvaluationData(ABC):
    """Shards to evaluate on."""

    @abstractmethod
    def eval_batches(
        self, config: Config, *, rank: int, world_size: int, batch_size: int, pin_memory: bool
    ) -> Iterator[Batch]:
        """One pass over the shards: each sample once over all ranks, in equally many equal batches per rank.

        Batches are padded with weight 0; `seeds` are the samples' positions in the order of the shards, the same for
        any number of ranks and workers. Raises UserError.
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

    def check_batch_change(self, config: Config, before: int) -> None:
        """Raises UserError if the order cannot continue with this batch where steps of `before` samples left it."""

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
        image_size_of: ImageSizeOf | None = None,
    ) -> Iterator[Batch]:
        """Endless micro-batches of this rank, from position `consumed` of the run on, without the windows `skipped`.

        A step takes from each rank the micro-batches that `split_batch` gives it, none over `micro_batch_size` images.
        `node_ranks`: all ranks of this node, for the one of them that announces to the storage of remote shards what
        will be read. `image_size_of`: the side in pixels of the images of each step, counted from the first of these,
        which is number 0; None: all have model.image_size. Raises UserError.
        """
