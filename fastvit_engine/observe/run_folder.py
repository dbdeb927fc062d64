"""The folder of a run, and the paths in it."""

import re
from dataclasses import dataclass
from pathlib import Path

from fastvit_engine.errors import UserError
from fastvit_engine.shown import public_url

_URL = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+:/|pipe:")


def run_folder_path(out: str | Path) -> Path:
    """The run folder that `train` is given; a file:// URL becomes its path.

    Raises UserError for a URL: records grow line by line, which no object does.
    """
    text = str(out)
    if _URL.match(text):
        url = public_url(re.sub(r"^([A-Za-z0-9+.-]+):/+", r"\1://", text))
        raise UserError(
            f"the run folder is {url}, and it must be on this machine: name a local folder, and set checkpoint.path to "
            "the URL to keep the checkpoints there"
        )
    return Path(re.sub(r"^file:(//)?(?=/)", "", text))


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
