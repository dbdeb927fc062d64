"""The results of trials on this machine, in the user's cache folder: one small file for each job that was tried."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvit_engine.files import atomic_write
from fastvit_engine.train.trial.search import Tried

_DIGITS = 16  # of a digest


@dataclass(frozen=True)
class Remembered:
    """Where the result of one job's trial is kept.

    job: what decides how much memory a step takes, and how much there is.
    """

    folder: Path
    job: Mapping[str, Any]

    @property
    def path(self) -> Path:
        return self.folder / f"{digest_of(self.job)}.json"

    def read(self) -> int | None:
        """The micro-batch of an earlier trial; None if there was none, or its file says nothing of this job."""
        try:
            content = json.loads(self.path.read_text())
            size = content["micro_batch_size"] if content["job"] == json.loads(_text_of(self.job)) else None
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None
        return size if type(size) is int and size > 0 else None

    def write(self, micro_batch_size: int, tried: Sequence[Tried]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "micro_batch_size": micro_batch_size,
            "peak_bytes": {str(each.micro_batch_size): each.peak_bytes for each in tried},  # null: did not fit
            "job": self.job,
        }
        atomic_write(self.path, json.dumps(content, indent=1, default=str) + "\n")


def digest_of(job: Mapping[str, Any]) -> str:
    """In hexadecimal digits; equal if the jobs are."""
    return hashlib.sha256(_text_of(job).encode()).hexdigest()[:_DIGITS]


def _text_of(job: Mapping[str, Any]) -> str:
    return json.dumps(job, sort_keys=True, default=str)
