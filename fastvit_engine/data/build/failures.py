"""How many images may fail before a command that writes shards stops."""

import math

from fastvit_engine.data.build.parallel import Counter
from fastvit_engine.errors import UserError

_FEW = 1000  # the fraction of failures is judged over at least this many images


class Failures:
    """Counts images, and those that have failed, over all workers.

    max_failed: the fraction that may fail. total: how many images there are, None if nobody knows.
    """

    def __init__(self, max_failed: float, total: int | None) -> None:
        self.done, self.failed = Counter(), Counter()
        self._max_failed, self._few = max_failed, _FEW if total is None else min(_FEW, total)

    def add(self, where: str, reason: str) -> None:
        """Counts an image that has failed. Raises UserError if too many have."""
        self.failed.add()
        judged_over = max(self.done.value + 1, self._few)
        if self.failed.value <= self._max_failed * judged_over:
            return
        enough = share_that_allows(self.failed.value, judged_over)
        if self._max_failed == 0:
            remedy = f"repair it, or leave bad images out with --max-failed {enough}, and run again"
            raise UserError(f"{where} {reason}: {remedy if enough else 'repair it, and run again'}")
        raise UserError(
            f"{self.failed.value:,} of {self.done.value + 1:,} images failed, more than --max-failed "
            f"{self._max_failed} allows; the last one, {where}, {reason}: repair the source"
            + (f", or allow more with --max-failed {enough}" if enough else "")
        )


def share_that_allows(failed: int, images: int) -> str | None:
    """The smallest value of --max-failed, to one digit, with which so many may fail; None if all of them did."""
    scale = 10.0 ** math.floor(math.log10(failed / images))
    shares = (float(f"{digit * scale:g}") for digit in range(1, 11))
    share = next(share for share in shares if failed <= share * images)
    return f"{share:g}" if share < 1 else None
