"""The folder of a run, on this machine or in an object store, and the paths in it.

A run whose folder is a URL writes its records to a working folder of this machine; `checkpoint.records` uploads them.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastvit_engine.errors import UserError
from fastvit_engine.shown import public_url
from fastvit_engine.storage.stores import is_store, open_store
from fastvit_engine.trusted_folders import trusted_folder

WORKING_FOLDERS = "FASTVIT_RUNS"  # the variable that says where working folders lie
_URL = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+:/|pipe:")


def run_folder(out: str | Path, environment: Mapping[str, str] = os.environ) -> "RunFolder":
    """The run folder that a path or a URL of an object store names; asks no server, and creates nothing.

    A file:// URL becomes its path. The working folder of a URL follows from the URL alone. Raises UserError for any
    other URL, and for one with secrets: paths, owner records and command lines of ranks would hold them.
    """
    text = str(out)
    if not _URL.match(text):
        return RunFolder(Path(re.sub(r"^file:(//)?(?=/)", "", text)))
    url = with_both_slashes(text).rstrip("/")
    if not is_store(url):
        raise UserError(
            f"the run folder is {public_url(url)}, which no run can be written to: name a local folder, or an object "
            "store (s3://, gs://, az://)"
        )
    if public_url(url) != url:
        raise UserError(
            f"the run folder is {public_url(url)} with a user name, a password or parameters: leave them out, and set "
            "the store's credentials in the environment"
        )
    store, key = open_store(url)
    place = f"{store.config.root.rstrip('/')}/{key}"  # the same for every spelling of the scheme
    readable = re.sub(r"[^A-Za-z0-9._]+", "-", place.partition("://")[2]).strip("-.")[-60:]
    digest = hashlib.sha256(place.encode()).hexdigest()[:12]
    return RunFolder(_working_folders(environment) / f"{readable}-{digest}", url)


def with_both_slashes(source: str) -> str:
    """A URL whose second slash is lost, as in a `pathlib.Path`, with both; anything else as it is."""
    return re.sub(r"^(?!file:)([A-Za-z][A-Za-z0-9+.-]+):/+(?=[^/])", r"\1://", source)


def _working_folders(environment: Mapping[str, str]) -> Path:
    if folder := environment.get(WORKING_FOLDERS):
        return Path(folder).expanduser().absolute()
    try:
        return cache_folder(environment) / "runs"
    except UserError as error:
        raise UserError(
            f"this user has no home directory for the working folder of a run: set {WORKING_FOLDERS} to a folder"
        ) from error


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where the engine keeps for this user what can be made again. Raises UserError without a home directory."""
    try:
        return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastvit"
    except RuntimeError as error:
        raise UserError("this user has no home directory for a cache: set XDG_CACHE_HOME to a folder") from error


@dataclass(frozen=True)
class RunFolder:
    """The paths inside a run folder."""

    path: Path  # on this machine
    url: str | None = None  # of the folder in an object store that `path` is the working folder of

    def __str__(self) -> str:
        """The path or the URL, for people."""
        return str(self.path) if self.url is None else public_url(self.url)

    @property
    def name(self) -> str:
        return self.path.resolve().name if self.url is None else str(self).rpartition("/")[2]

    def describe(self, path: Path) -> str:
        """Where a file of the folder is, for people."""
        return str(path) if self.url is None else f"{self}/{path.relative_to(self.path).as_posix()}"

    @property
    def checkpoint_location(self) -> str:
        """Path or URL of the checkpoints, unless checkpoint.path is set."""
        return str(self.checkpoints) if self.url is None else f"{self.url}/checkpoints"

    def prepare(self) -> None:
        """Creates a working folder, which no other user may write to. Raises UserError if that cannot be."""
        if self.url is None:
            return
        try:
            trusted_folder(self.path, WORKING_FOLDERS)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be the working folder of {self} ({error.strerror}): set {WORKING_FOLDERS} to a "
                "folder of your own"
            ) from error

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
    def reconstructions(self) -> Path:
        """Pictures of hidden patches as a masked autoencoder predicts them."""
        return self.path / "reconstructions.json"

    @property
    def inspection(self) -> Path:
        """Figures of what the model has learned, if `fastvit inspect` wrote them here."""
        return self.path / "inspect"

    @property
    def classes(self) -> Path:
        """How well each class is recognised, and which are confused."""
        return self.path / "classes.json"

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
    def trackers(self) -> Path:
        """By which id trackers know the run."""
        return self.path / "trackers.json"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def report(self) -> Path:
        return self.path / "report.html"
