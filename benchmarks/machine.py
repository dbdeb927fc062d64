"""The machine: what it is, how it is doing, and how fast it copies and multiplies at best."""

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.peers import version
from benchmarks.timing import Clock

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "torch", "triton", "numpy", "deepspeed", "timm", "transformers", "apex", "flash-attn", "flash-attn-3",
    "flash-attn-4", "quack-kernels", "liger-kernel", "transformer-engine", "xformers", "torchao", "fastvit-engine",
)  # fmt: skip
VARIABLES = (  # that change what runs, or how fast
    "FASTVIT_KERNELS", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_LAUNCH_BLOCKING",
    "NVIDIA_TF32_OVERRIDE",
)  # fmt: skip
SENSORS = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "temperature.gpu": "celsius",
    "power.draw": "watts",
    "clocks_event_reasons.active": "slowed_by",
}


def pick_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def slug(device: torch.device) -> str:
    """The name of this machine's folder of results: "cpu", or the GPU's, "nvidia-h200"."""
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def describe(device: torch.device, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Everything that somebody needs who wants to see the same figures; no name of a host or a user."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "command": shlex.join(command or ["fastvit", *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "gpu": properties and properties.name,
        "gpu_memory_bytes": properties and properties.total_memory,
        "driver": ask("driver_version", device) if properties else None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if properties else None,
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def commit() -> str | None:
    """Of the checkout, with "+changes" where files differ from it."""
    try:
        run = lambda *words: subprocess.run(  # noqa: E731
            ["git", *words], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.strip()
        return run("rev-parse", "HEAD") + ("+changes" if run("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def sensors(device: torch.device) -> dict[str, float | str] | None:
    """Clocks, temperature and power now, as nvidia-smi reports them; None if it reports nothing."""
    answer = ask(",".join(SENSORS), device) if device.type == "cuda" else None
    if answer is None:
        return None
    read: dict[str, float | str] = {}
    for name, text in zip(SENSORS.values(), answer.split(", "), strict=False):
        read[name] = float(text) if re.fullmatch(r"[\d.]+", text) else text
    return read


def ask(query: str, device: torch.device) -> str | None:
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            [*command, *([f"--id=GPU-{uuid}"] if uuid else [])], check=True, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def measure_ceilings(clock: Clock, dtypes: Sequence[torch.dtype], quick: bool) -> dict[str, Any]:
    """What a plain copy and a large matrix product reach here and now, on random data: bytes and FLOP a second.

    The copy counts bytes read and written. Its buffers are far larger than the cache.
    """
    on_gpu, turns = clock.on_gpu, 5 if quick else 15
    size = (1 << 29) if on_gpu else (1 << 25)  # numbers of 4 bytes
    copy = copy_rate(clock, size, turns)
    matmul = {}
    side = 8192 if on_gpu else (512 if quick else 1024)
    for dtype in dtypes:
        a, b = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
        matmul[str(dtype).removeprefix("torch.")] = 2 * side**3 / seconds(clock, lambda a=a, b=b: a @ b, turns)
    return {"copy_bytes_per_second": copy, "matmul_side": side, "matmul_flops": matmul}


def copy_rate(clock: Clock, size: int, turns: int) -> float:
    source, target = torch.rand(size, device=clock.device), torch.empty(size, device=clock.device)
    return 2 * source.nbytes / seconds(clock, lambda: target.copy_(source), turns)


def seconds(clock: Clock, call: Any, turns: int) -> float:
    times = []
    for turn in range(-2, turns):
        clock.hold(1e-4)
        start = clock.mark()
        call()
        end = clock.mark()
        clock.wait()
        if turn >= 0:
            times.append(clock.milliseconds(start, end))
    return 1e-3 * median(times)
