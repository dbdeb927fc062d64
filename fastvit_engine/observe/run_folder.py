"""The folder of a run: where each thing lies, how it is written, and what is noted about the machine."""

import contextlib
import importlib.metadata
import os
import platform
import shlex
import socket
import sys
import uuid
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import fastvit_engine

_PACKAGES = ("torch", "deepspeed", "webdataset", "triton", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """The paths inside a run folder; nothing is created here."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

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


def atomic_write(path: Path, content: str | bytes) -> None:
    """Writes `content` (text as UTF-8) so that `path` holds the old or the new content, whole, whenever power fails."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """Makes a file durable, or a rename within a folder: the directory entry is data of the folder, not of the file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def collect_environment(**extra: Any) -> dict[str, Any]:
    """What `environment.json` says of software and machine; `extra` is added to it (and wins).

    `versions` maps each package to its version or None when it is not installed; `gpu` is the name of the current
    CUDA or ROCm device or None; `started` is ISO 8601 with the zone's offset.
    """
    return {
        "versions": {
            "fastvit_engine": fastvit_engine.__version__,
            "python": platform.python_version(),
            **{package: _version(package) for package in _PACKAGES},
        },
        "hostname": socket.gethostname(),
        "cpu_count": os.cpu_count(),
        "gpu": _gpu_name(),
        "command": shlex.join(["fastvit", *sys.argv[1:]]),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        **extra,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu_name() -> str | None:
    import torch  # imported here: the rest of this module serves commands that never need it

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
