"""One pass over shards outside of a run: which samples, and how they are prepared for a model."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from fastvit_engine.config import Config, Resolved
from fastvit_engine.config.packing import check_packed_model
from fastvit_engine.cores import cores_here
from fastvit_engine.data import Batch
from fastvit_engine.data.shards.names import DatasetInfo, Split, about_teacher, info_beside
from fastvit_engine.data.shards.usable import PLAUSIBLE_CLASSES
from fastvit_engine.data.stream.bad_samples import checked
from fastvit_engine.data.stream.prepare import streamed_shards
from fastvit_engine.data.stream.streams import StreamedShards
from fastvit_engine.models import AnyModel
from fastvit_engine.observe.progress import WorkProgress


def config_for(model: AnyModel, resolved: Resolved) -> Config:
    """`resolved` for images of this model, prepared as its run did unless it says otherwise; labels may be any."""
    changes: dict[str, Any] = {
        f"data.{key}": value
        for key, value in (("eval_crop", model.eval_crop), ("eval_transform", model.eval_transform))
        if value is not None and resolved.origins.get(f"data.{key}", "default") == "default"
    }
    changes["data.num_workers"] = workers_for(resolved.config)
    data = resolved.config.data.model_copy(update={key.partition(".")[2]: value for key, value in changes.items()})
    if resolved.config.packing.on:
        check_packed_model(model.config, resolved.config.packing)
    section = model.config.model_copy(update={"num_classes": PLAUSIBLE_CLASSES})
    return resolved.config.model_copy(update={"model": section, "data": data})


def workers_for(config: Config) -> int:
    """Decoding processes: data.num_workers; unless somebody has set it, no more than this process has CPUs."""
    given = config.data.num_workers
    return min(config.data.workers, cores_here()) if given is None else given


@dataclass(frozen=True)
class OnePass:
    """Some shards, to be read once from beginning to end, which needs no index."""

    shards: StreamedShards
    config: Config  # of `config_for`
    info: DatasetInfo | None  # dataset.json beside the shards
    notes: tuple[str, ...]  # which shards were chosen by their names
    limit: int | None = None  # only the first samples
    counts: list[int] = field(default_factory=list)  # of the samples of each pass so far

    @classmethod
    def over(cls, pattern: str, split: Split, config: Config, *, named: str, limit: int | None = None) -> "OnePass":
        """Finds the shards. `pattern`, `split` and `named`: as `streamed_shards` takes them. Raises UserError."""
        notes: list[str] = []
        shards = streamed_shards(pattern, split, config, named=named, notes=notes)
        info = info_beside(list(shards.shards))
        notes += about_teacher(info, pattern)
        return cls(shards, config, info, tuple(notes), limit)

    @property
    def samples(self) -> int | None:
        """How many there are; None if nobody has counted them."""
        if self.info is None:
            return None
        counts = self.info.train.shards | self.info.eval.shards
        names = [shard.rpartition("/")[2] for shard in self.shards.shards]
        total = sum(counts[name] for name in names) if all(name in counts for name in names) else None
        return total if total is None or self.limit is None else min(total, self.limit)

    def batches(self, batch_size: int, *, doing: str, progress: WorkProgress) -> Iterator[Batch]:
        """The batches of the pass; see EvaluationData for their order. Says how many samples are left out as bad.

        Raises UserError for labels that are none, and if too many samples are bad.
        """
        size = batch_size if self.limit is None else min(batch_size, self.limit)
        pin_memory = torch.cuda.is_available()
        batches = self.shards.eval_batches(self.config, rank=0, world_size=1, batch_size=size, pin_memory=pin_memory)
        progress.start(doing, self.samples, "images")
        done = 0
        for batch in checked(batches if self.limit is None else _first(batches, self.limit), self._max_bad_share):
            yield batch
            done += sum(map(bool, batch.keys))
            progress.update(done)
        progress.clear()
        self.counts.append(done)

    @property
    def seen(self) -> int:
        """How many samples the last whole pass met, bad ones included."""
        return self.counts[-1]

    @property
    def _max_bad_share(self) -> float:
        return self.config.data.max_bad_share


def _first(batches: Iterator[Batch], limit: int) -> Iterator[Batch]:
    """The samples at the first positions; others become padding. Positions may come in any order."""
    missing = limit
    for batch in batches:
        for row, (key, position) in enumerate(zip(batch.keys, batch.seeds.tolist(), strict=True)):
            if key and position >= limit:
                batch.keys[row], batch.weights[row] = "", 0
            missing -= bool(batch.keys[row])
        bad = tuple(sample for sample in batch.bad if sample.key in batch.keys)
        if any(batch.keys):
            yield batch._replace(bad=bad)
        if missing == 0:
            return
