"""Everything about the data that can be refused before training starts."""

from pathlib import Path

from fastvit_engine.config import Config
from fastvit_engine.data.decode import decode_sample
from fastvit_engine.data.loader import StreamPlan, plan_streams
from fastvit_engine.data.shards import Split, find_shards, info_beside, is_local
from fastvit_engine.data.stream import read_shard
from fastvit_engine.errors import UserError


def check_data(config: Config, *, world_size: int) -> StreamPlan:
    """UserError where the shards of data.train, or of data.eval if it is set, cannot serve this configuration.

    Looks at every shard's size, at dataset.json and at the first sample. Returns how training will read the shards.
    """
    shards = find_shards(config.data.train, "train")
    plan = plan_streams(config, world_size=world_size, shards=len(shards))
    _check_split(config, shards, "train")
    if config.data.eval:
        _check_split(config, find_shards(config.data.eval, "eval"), "eval")
    return plan


def _check_split(config: Config, shards: list[str], split: Split) -> None:
    local = [shard for shard in shards if is_local(shard)]
    for shard in local:
        if Path(shard).stat().st_size == 0:
            raise UserError(f"shard {shard} of data.{split} is an empty file: copy or make it again")
    info = info_beside(shards)
    if info is not None and len(info.classes) > config.model.num_classes:
        raise UserError(
            f"data.{split} has {len(info.classes)} classes but model.num_classes is {config.model.num_classes}: "
            f"set model.num_classes to {len(info.classes)}"
        )
    for sample in (sample for shard in local[:1] for sample in read_shard(shard)):
        decode_sample(sample, config.data, config.model.num_classes)
        break
