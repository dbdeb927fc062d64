"""What a check has found: one line, and one line of what to do about it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from fastvit_engine.shown import shown


class Status(StrEnum):
    """How good it is, from best to worst."""

    OK = "ok"
    NOTE = "note"  # worth knowing; nothing to fix for most runs
    WARNING = "warning"  # a run starts, and is slower or at risk
    PROBLEM = "problem"  # a run would fail, or be wrong


@dataclass(frozen=True)
class Finding:
    """One result. Raises ValueError unless exactly the findings that are not ok say what to do."""

    group: str  # of checks: "software"
    subject: str  # "torch"; with the group, unique on a node
    status: Status
    found: str
    advice: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)  # what was measured, for --json
    speed: str = ""  # the figure that tells the slowest of several nodes; higher is better
    same: str = ""  # what must be the same on every node, say a version; empty: nothing

    def __post_init__(self) -> None:
        if (self.status == Status.OK) == bool(self.advice):
            raise ValueError(f"{self.subject}: a finding that is not ok has advice, and no other: {self}")
        for name in ("found", "advice"):
            object.__setattr__(self, name, shown(getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"status": str(self.status)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Finding":
        return cls(**{**content, "status": Status(content["status"])})


@dataclass(frozen=True)
class Group:
    """Makes the findings of one group of checks."""

    name: str

    def ok(self, subject: str, found: str, **more: Any) -> Finding:
        return Finding(self.name, subject, Status.OK, found, **more)

    def note(self, subject: str, found: str, advice: str, **more: Any) -> Finding:
        return Finding(self.name, subject, Status.NOTE, found, advice, **more)

    def warning(self, subject: str, found: str, advice: str, **more: Any) -> Finding:
        return Finding(self.name, subject, Status.WARNING, found, advice, **more)

    def problem(self, subject: str, found: str, advice: str, **more: Any) -> Finding:
        return Finding(self.name, subject, Status.PROBLEM, found, advice, **more)

    def refused(self, subject: str, error: Exception, **more: Any) -> Finding:
        """A problem that another part of the engine puts into one sentence, "what is wrong: what to do"."""
        found, colon, advice = str(error).rpartition(": ")
        return self.problem(subject, found if colon else str(error), advice if colon else "correct it", **more)
