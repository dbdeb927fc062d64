"""How the global batch of a step is divided: over the ranks, and each rank's share into micro-batches.

Which samples a step has, and which two of them are mixed with each other, depends on none of this.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fastvit_engine.config import Config, MocoConfig
from fastvit_engine.data.stream.order import Integers
from fastvit_engine.errors import UserError


@dataclass(frozen=True)
class BatchSplit:
    """Each of `world_size` ranks takes a share of the global batch in `accumulation_steps` passes.

    A pass is a forward and a backward pass over one micro-batch. Every rank makes as many, since they communicate.
    Shares differ by at most one image, or one pair of images if they are mixed in pairs; so do the micro-batches of a
    rank. A rank with fewer images than passes fills the last ones with padding.
    """

    global_batch_size: int
    world_size: int
    accumulation_steps: int
    pairs: bool = False  # images 2i and 2i + 1 of the global batch are mixed, so they share a micro-batch

    @property
    def equal(self) -> bool:
        """Whether all micro-batches of all ranks have the same size."""
        return self.micro_batch_size * self.accumulation_steps * self.world_size == self.global_batch_size

    @property
    def micro_batch_size(self) -> int:
        """Images of the largest micro-batch."""
        return self.micro_batches(0)[0]

    @property
    def largest_share(self) -> int:
        """Images of rank 0; no rank has more."""
        return sum(self.micro_batches(0))

    @property
    def smallest_share(self) -> int:
        """Images of the last rank; no rank has fewer."""
        return sum(self.micro_batches(self.world_size - 1))

    @property
    def idle_ranks(self) -> int:
        """Ranks without images: there are fewer pairs than ranks."""
        return max(0, self.world_size - _units(self.global_batch_size, self.pairs))

    def positions(self, rank: int) -> Integers:
        """The positions within a global batch that belong to a rank, [share]: every world_size-th pair of neighbours.

        Every world_size-th position if images are not mixed, and pairs would make the shares unequal.
        """
        shares_of_pairs = self.global_batch_size % (2 * self.world_size) == 0
        size = 2 if self.pairs or shares_of_pairs else 1
        own = np.arange(-(-self.global_batch_size // size) * size).reshape(-1, size)[rank :: self.world_size].ravel()
        return own[own < self.global_batch_size]

    def micro_batches(self, rank: int) -> tuple[int, ...]:
        """Images in each pass of a rank, the largest first; 0: the pass is padding."""
        units, passes = _units(self.global_batch_size, self.pairs), self.accumulation_steps
        own = len(range(rank, units, self.world_size))
        sizes = [_unit(self.pairs) * (own // passes + (number < own % passes)) for number in range(passes)]
        missing = _unit(self.pairs) * units - self.global_batch_size  # the partner that the last image does not have
        if missing and rank == (units - 1) % self.world_size:
            sizes[min(own, passes) - 1] -= missing
        return tuple(sizes)

    def images_computed(self, rank: int) -> int:
        """Images that a rank computes with in a step: its share and the padding, of one image per pass."""
        return sum(max(size, 1) for size in self.micro_batches(rank))

    def loss_scale(self, images: int) -> float:
        """What the mean loss of a micro-batch of so many images, padding included, is multiplied by.

        Engines average over passes and ranks. This makes the average that of the global batch.
        """
        return images * self.accumulation_steps * self.world_size / self.global_batch_size


def split_batch(config: Config, world_size: int) -> BatchSplit:
    """The split with the fewest passes whose micro-batches do not exceed `train.micro_batch_size`.

    Raises UserError if there is none, or the global batch has fewer images than there are processes.
    """
    return next(possible_splits(config, world_size, config.train.micro_batch_size))


def possible_splits(config: Config, world_size: int, largest: int | None = None) -> Iterator[BatchSplit]:
    """Splits with micro-batches of at most `largest` images, the largest micro-batches first.

    If the global batch divides over the ranks, all micro-batches have the same size. train.objective = moco has one
    pass. Raises UserError as `split_batch`.
    """
    batch, pairs = config.train.global_batch_size, mixes_pairs(config)
    if batch < world_size:
        raise UserError(
            f"train.global_batch_size is {batch}, fewer images than the {world_size} processes: raise it, or train "
            "with fewer processes"
        )
    if largest is not None and largest < min(_unit(pairs), batch):
        raise UserError(
            f"train.micro_batch_size is {largest}, and augment.mixup and augment.cutmix mix images in pairs: set it to "
            "2 or more"
        )
    units, before = _units(batch, pairs), None
    equal, share = batch % (_unit(pairs) * world_size) == 0, -(-units // world_size)
    whole = isinstance(config.pretraining, MocoConfig)
    if whole and largest is not None and largest < share:
        raise UserError(
            f"train.micro_batch_size is {largest}, and each process has {share} images of train.global_batch_size: "
            f"train.objective = {config.train.objective} normalises and compares all images of a step at once. Set it "
            "to null; if the images do not fit, use more processes or a smaller batch"
        )
    for passes in range(1, 2 if whole else share + 1):
        if equal and share % passes:
            continue
        split = BatchSplit(batch, world_size, passes, pairs)
        size = split.micro_batch_size
        if size != before and (largest is None or size <= largest):
            before = size
            yield split


def mixes_pairs(config: Config) -> bool:
    """Whether neighbouring images are mixed."""
    return config.augment.mixup > 0 or config.augment.cutmix > 0


def _unit(pairs: bool) -> int:
    return 2 if pairs else 1


def _units(batch: int, pairs: bool) -> int:
    """Images of a global batch, or pairs; the last image of an odd batch has no partner, and counts as a pair."""
    return -(-batch // _unit(pairs))
