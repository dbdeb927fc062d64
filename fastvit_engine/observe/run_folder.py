"""The folder of a run, and the paths in it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """The paths inside a run folder; nothing is created here."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def configs(self) -> Path:
        """The configuration of every start, numbered."""
        return self.path / "configs"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def recovery(self) -> Path:
        return self.path / "recovery.json"

    @property
    def stacks(self) -> Path:
        return self.path / "stacks"

    @property
    def samples(self) -> Path:
        return self.path / "samples.json"

    @property
    def bad_samples(self) -> Path:
        return self.path / "bad_samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def report(self) -> Path:
        return self.path / "report.html"
