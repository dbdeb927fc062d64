"""The record of software and machine in `environment.json`."""

import importlib.metadata
import os
import platform
import shlex
import socket
import sys
from datetime import datetime
from typing import Any

import torch

import fastvit_engine
from fastvit_engine.shown import recorded, without_secrets

_PACKAGES = (
    "fastvit-kernels",
    "deepspeed",
    "webdataset",
    "triton",
    "numpy",
    "timm",
    "flash-attn",
    "quack-kernels",
    "apex",
)


def collect_environment(**extra: Any) -> dict[str, Any]:
    """Returns the content of `environment.json`; `extra` is added and takes precedence.

    `versions` maps each package to its version, or None if it is not installed; `gpu` is the name of the current CUDA
    or ROCm device, or None; `started` is ISO 8601 with the zone's offset. URLs are without their secrets.
    """
    content = {
        "versions": package_versions(),
        "hostname": socket.gethostname(),
        "cpu_count": os.cpu_count(),
        "gpu": _gpu_name(),
        "command": shlex.join(["fastvit", *map(without_secrets, sys.argv[1:])]),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        **extra,
    }
    return {name: recorded(value) for name, value in content.items()}


def package_versions() -> dict[str, str | None]:
    """Of each package that a run depends on; None: it is not installed."""
    return {
        "fastvit_engine": fastvit_engine.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,  # which names its build, as the version of its wheel may not
        **{package: _version(package) for package in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu_name() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
