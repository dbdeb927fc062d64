"""Samples without a usable image: they have weight 0, are counted and named, and too many of them stop the run."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypedDict

from fastvit_engine.data.stream.bad_samples import FEWEST, sentence_about, setting_for
from fastvit_engine.data.stream.batch import BadSample, Batch
from fastvit_engine.distributed.world import World
from fastvit_engine.errors import UserError
from fastvit_engine.files import append_json_lines, read_json_lines
from fastvit_engine.observe.disk import if_possible
from fastvit_engine.observe.recorder import Recorder
from fastvit_engine.shown import recorded

_MOST_IN_A_ROW = 100  # on one process
_MOST_SHOWN = 20  # on the terminal; the file has all


class UnsettledBad(TypedDict):
    """Bad samples that one process has met and not yet told the others."""

    bad: int
    in_a_row: int
    found: list[list[str]]  # of BadSample


class BadSamples:
    """Counts over the whole run, from `bad` of `seen` samples on; each bad sample is named once in the file `path`."""

    def __init__(
        self, path: Path, max_share: float, *, seen: int = 0, bad: int = 0, unsettled: "UnsettledBad | None" = None
    ) -> None:
        """unsettled: that this process has met before, of samples that `seen` counts."""
        self.path, self.max_share = path, max_share
        self.seen, self.bad = seen, bad
        self._seen_here, self._bad_here, self._in_a_row = 0, 0, 0  # since the last settlement, but for the last
        self._found: list[BadSample] = []
        if unsettled is not None:
            self._bad_here, self._in_a_row = unsettled["bad"], unsettled["in_a_row"]
            self._found = [BadSample(*sample) for sample in unsettled["found"]]
        rows = read_json_lines(path) if path.exists() else []
        self._named = {(row.get("shard"), row.get("key")) for row in rows}

    @property
    def unsettled(self) -> "UnsettledBad":
        """What this process has met since the last settlement, as JSON."""
        return {"bad": self._bad_here, "in_a_row": self._in_a_row, "found": [list(one) for one in self._found]}

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, counted. Raises UserError if this process has met nothing but bad samples for long."""
        for batch in batches:
            self._count(batch)
            yield batch

    def settle(self, world: World, recorder: Recorder | None) -> int:
        """Adds up what all processes have seen and names what is new; returns the bad samples so far. Collective.

        Raises UserError on every process if they are more than the allowed share.
        """
        seen, bad = (round(total) for total in world.sum([self._seen_here, self._bad_here]).tolist())
        self.seen += seen
        self.bad += bad
        if bad:
            found = [sample for samples in world.gather(self._found) for sample in samples]
            world.on_main(lambda: self._name(found, recorder))
            if self.bad >= FEWEST and self.bad > self.max_share * self.seen:
                raise UserError(
                    f"{self.bad:,} of {self.seen:,} samples have no usable image, more than data.max_bad_share = "
                    f"{self.max_share:g} allows; the last, {sentence_about(found[-1])}: repair the shards (all are "
                    f"named in {self.path}) or raise data.max_bad_share"
                )
        self._seen_here, self._bad_here, self._found = 0, 0, []
        return self.bad

    def _count(self, batch: Batch) -> None:
        self._found += batch.bad
        for key, weight in zip(batch.keys, batch.weights.tolist(), strict=True):
            if key:  # no padding
                self._seen_here += 1
                self._bad_here += weight == 0
                self._in_a_row = self._in_a_row + 1 if weight == 0 else 0
            if self._in_a_row >= _MOST_IN_A_ROW:
                raise UserError(
                    f"the last {self._in_a_row} samples have no usable image; one of them, "
                    f"{sentence_about(self._found[-1])}: repair the shards, or {setting_for(self._found[-1])}"
                )

    def _name(self, found: list[BadSample], recorder: Recorder | None) -> None:
        new = {(s.shard, s.key): s for s in found if (s.shard, s.key) not in self._named}
        if not new:
            return
        if_possible(lambda: append_json_lines(self.path, (recorded(s._asdict()) for s in new.values())), str(self.path))
        shown = max(0, _MOST_SHOWN - len(self._named))
        for sample in list(new.values())[:shown]:
            if recorder:
                recorder.message(f"left out: {sentence_about(sample)}")
        if recorder and shown < len(new):
            recorder.message(f"left out: more samples, all named in {self.path}")
        self._named |= new.keys()
