"""Trains recipes over shards with `fastvit train`, in a folder of runs, and reads what came of each run."""

import argparse
import contextlib
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from benchmarks.step_overhead import describe_machine
from fastvit_engine.config import Config
from fastvit_engine.files import atomic_write
from fastvit_engine.observe.metrics import Metrics, read_all_metrics


@dataclass
class Ran:
    """What a command printed and took; `cpu_s` is that of all child processes that ended meanwhile."""

    output: str
    wall_s: float
    cpu_s: float


Command = Callable[[Sequence[str]], Ran]


def fastvit(arguments: Sequence[str], **variables: str) -> Ran:
    """Runs a command of `fastvit`, with more environment variables; raises CalledProcessError if it fails."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    words = [sys.executable, "-m", "fastvit_engine", *arguments]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Ran(done.stdout, time.monotonic() - began, cpu)


@dataclass(frozen=True)
class Shards:
    """What is trained on, and what it is measured on."""

    train: tuple[str, ...]
    test: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path) -> "Shards":
        """`train-*` and `test-*` of a folder. Exits with a message if it lacks either."""
        return cls(shards_of(folder, "train"), shards_of(folder, "test"))

    def held_out(self) -> "Shards":
        """The last training shard in place of the test images: settings are chosen there."""
        if len(self.train) < 2:
            raise SystemExit(f"{self.train[0]} is the only training shard, and cannot be held out: make more")
        return Shards(self.train[:-1], self.train[-1:])


def shards_of(folder: Path, split: str) -> tuple[str, ...]:
    """The shards of a split, in order. Exits with a message if there are none."""
    found = sorted(str(path) for ending in ("tar", "tar.gz") for path in folder.resolve().glob(f"{split}-*.{ending}"))
    if not found:
        raise SystemExit(f"{folder} has no {split}-*.tar or {split}-*.tar.gz")
    return tuple(found)


@dataclass(frozen=True)
class Trained:
    """A run of `fastvit train`, and what its folder says."""

    run: Path
    command: str  # without the folder of the runs
    ran: Ran
    resumed: bool  # the run was there before: `ran` is of its last command only

    @cached_property
    def metrics(self) -> Metrics:
        return read_all_metrics(self.run / "metrics.jsonl")

    @cached_property
    def environment(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run / "environment.json").read_text())
        return found

    @property
    def cpu_s(self) -> float | None:
        """CPU seconds of the whole command; None if there were several."""
        return None if self.resumed else self.ran.cpu_s

    @property
    def wall_s(self) -> float | None:
        return None if self.resumed else self.ran.wall_s


@dataclass(frozen=True)
class Runs:
    """A folder of runs, and how each is trained."""

    folder: Path
    command: Command = fastvit
    cpu_processes: int | None = None  # None: one process, or one per GPU

    def listed(self, name: str, shards: Iterable[str]) -> str:
        """Writes NAME.txt, which lists some shards; returns the pattern that reads it."""
        path = self.folder / f"{name}.txt"
        atomic_write(path, "".join(f"{shard}\n" for shard in shards))
        return f"@{path}"

    def train(
        self, name: str, recipe: str, settings: Iterable[str], *, options: Sequence[str] = (), resume: bool = True
    ) -> Trained:
        """Trains a recipe with these settings in the folder NAME. resume: continue the run that may be there."""
        run = self.folder / name
        words = ["train", recipe, *options, *(word for setting in settings for word in ("--set", setting))]
        if self.cpu_processes is not None:
            words += ["--cpu-processes", str(self.cpu_processes)]
        words += ["--out", str(run), *(("--resume", "auto") if resume else ())]
        resumed = run.exists()
        ran = self.command(words)
        shown = shlex.join(["fastvit", *(word.replace(f"{self.folder}/", "") for word in words)])
        return Trained(run, shown, ran, resumed)


def made_of(config: Config, shards: Iterable[str]) -> dict[str, Any]:
    """What a record is of: every setting but the seed, and the names of the training shards."""
    settings = config.model_dump(mode="json", exclude={"seed": True, "data": {"train", "eval"}})
    return settings | {"shards": [Path(shard).name for shard in shards]}


def is_of(record: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a record is made of this. A setting that is newer than the record had its default then."""
    written = dict(record["made_of"])
    besides = {name: written.pop(name, None) for name in wanted if name not in Config.model_fields}
    try:
        settings = made_of(Config.model_validate(written), ())
    except ValidationError:
        return False
    return settings | besides == wanted


def keep(path: Path, wanted: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The record in a file, or else that which `measure` returns, which is written there with what it is made of.

    Raises SystemExit if the record in the file is made of something else.
    """
    if path.exists():
        record: dict[str, Any] = json.loads(path.read_text())
        if not is_of(record, wanted):
            raise SystemExit(f"{path} is of other settings or shards: name another folder with --runs")
        return record
    record = measure() | {"made_of": wanted}
    atomic_write(path, json.dumps(record, indent=1) + "\n")
    return record


def parser_of(description: str | None, written: str) -> argparse.ArgumentParser:
    """A parser with what all measurements have in common; written: the names of the files in DIR."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="shards train-* and test-*")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help=f"where {written} go")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="a setting of every training")
    return parser


def add_runs(parser: argparse.ArgumentParser) -> None:
    """The option that names a folder of runs, see `folder_of_runs`."""
    parser.add_argument("--runs", metavar="RUNS", type=Path, help="folder of the runs, which is kept")


@contextlib.contextmanager
def folder_of_runs(given: Path | None) -> Iterator[Path]:
    """The folder that --runs names, or a temporary one."""
    with contextlib.nullcontext(given) if given else tempfile.TemporaryDirectory() as chosen:
        folder = Path(chosen).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def environment_of(module: str, arguments: Sequence[str] | None, given: argparse.Namespace) -> dict[str, Any]:
    """The machine, and the command without names of the machine's folders; no name of the host."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    folders = {"FOLDER": given.folder, "DIR": given.out, "RUNS": getattr(given, "runs", None)}
    named = {str(folder): name for name, folder in folders.items() if folder is not None}
    environment = describe_machine(shlex.join(["python", "-m", module, *(named.get(word, word) for word in words)]))
    environment.pop("hostname", None)
    return environment
