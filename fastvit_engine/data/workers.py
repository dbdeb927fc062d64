"""Batches from decoding processes."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from fastvit_engine.data.batch import Batch
from fastvit_engine.errors import UserError


def load(
    dataset: Dataset, *, num_workers: int, prefetch: int, requests: Iterable[Any] | None = None
) -> Iterator[Batch]:
    """What `dataset` gives for each of the requests, or gives when iterated, in order, from `num_workers` processes.

    Each of them keeps `prefetch` items ready. A UserError among the items is raised here, in one piece.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=requests,
        num_workers=num_workers,
        collate_fn=_unchanged,
        prefetch_factor=prefetch if num_workers else None,
        generator=torch.Generator(),  # or the loader would draw from, and so move, the global generator
    )
    try:
        for item in loader:
            if isinstance(item, UserError):
                raise item
            yield item
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            "a data worker process was killed, most often for lack of host memory or of /dev/shm: "
            "lower data.num_workers, or give the machine more of it"
        ) from error


def _unchanged(item: Any) -> Any:
    return item
