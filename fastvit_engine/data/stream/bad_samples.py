"""What is said of samples without a usable image, and when they are too many."""

import sys
from collections.abc import Iterable, Iterator

from fastvit_engine.data.stream.batch import BadSample, Batch
from fastvit_engine.errors import UserError
from fastvit_engine.observe.units import counted
from fastvit_engine.shown import public_url, say, shown

FEWEST = 10  # bad samples that can be too large a share


def checked(batches: Iterable[Batch], max_share: float) -> Iterator[Batch]:
    """The batches of one pass over a data set outside of a run; at its end, stderr says how many samples were bad.

    Raises UserError at the end if more samples were bad than the allowed share, or none was usable.
    """
    seen = bad = 0
    first: BadSample | None = None
    for batch in batches:
        for key, weight in zip(batch.keys, batch.weights.tolist(), strict=True):
            if key:  # no padding
                seen += 1
                bad += weight == 0
        first = first or next(iter(batch.bad), None)
        yield batch
    if first is None:
        return
    if bad == seen:
        raise UserError(
            f"none of {counted(seen, 'sample')} has a usable image; the first, {sentence_about(first)}: repair the "
            f"shards, or {setting_for(first)}"
        )
    if bad >= FEWEST and bad > max_share * seen:
        raise UserError(
            f"{bad:,} of {seen:,} samples have no usable image, more than data.max_bad_share = {max_share:g} allows; "
            f"the first, {sentence_about(first)}: repair the shards or raise data.max_bad_share"
        )
    say(f"left out: {bad:,} of {seen:,} samples; the first, {sentence_about(first)}", file=sys.stderr)


def setting_for(sample: BadSample) -> str:
    """The setting that may be why no image is usable."""
    return "raise data.max_pixels" if "of data.max_pixels" in sample.reason else "set data.image_key to what they hold"


def sentence_about(sample: BadSample) -> str:
    where = f" of shard {public_url(sample.shard)}" if sample.shard else ""
    return shown(f"sample '{sample.key}'{where} {sample.reason}")
