"""Records the steps of `train.profile` with PyTorch's profiler: a trace per step, and a table over all of them.

Each step is recorded by itself, so that memory holds one, and evaluations and saves between steps are left out.
"""

import gzip
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from triton.runtime.jit import KernelInterface

from fastvit_engine.config.sections import profiled_steps
from fastvit_engine.distributed.watchdog import Watchdog
from fastvit_engine.files import atomic_write, atomic_writer
from fastvit_engine.observe.disk import if_possible
from fastvit_engine.observe.profile_table import Call, Profile, as_text, kernel_lines, kind_lines, phase_lines
from fastvit_engine.train.job import Job
from fastvit_engine.train.throughput import Stopwatch

_PHASE = "phase: "  # what the names of phases begin with in a trace


class StepProfiler:
    """Profiles the steps of `train.profile` if this process is one of its ranks."""

    def __init__(self, job: Job, stopwatch: Stopwatch) -> None:
        config = job.config.train.profile
        self._job, self._stopwatch = job, stopwatch
        first, last = (0, -1) if config.steps is None else profiled_steps(config.steps)
        self._steps = range(first, last + 1)
        self._is_profiled = job.world.rank in config.ranks
        self._done: list[int] = []  # steps that are in no table yet
        self._calls: list[Call] = []
        self._phases: list[tuple[str, float]] = []
        self._seconds = 0.0

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Surrounds the optimizer step that makes it `step` of them; writes the trace, and the table after the last."""
        if step not in self._steps:
            yield
            return
        if self._is_profiled:
            with self._recorded() as recorded:
                yield
        else:
            yield
        self._job.processes.watchdog.phase("writing a profile", slow=True)  # as on every rank
        if self._is_profiled:
            with self._stopwatch.paused():
                self._take(step, recorded)
                if step == self._steps[-1]:
                    self.close()

    @contextmanager
    def _recorded(self) -> Iterator[profile]:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it writes two lines to the terminal each time
        if not self._done:
            with profile(activities=self._activities):  # the first one loads what it needs
                pass
        with profile(activities=self._activities) as recorded, _named_phases(self._job.processes.watchdog):
            began = time.perf_counter()
            yield recorded
            if self._job.world.device.type == "cuda":
                torch.cuda.synchronize()
            self._seconds += time.perf_counter() - began

    @property
    def _activities(self) -> list[ProfilerActivity]:
        on_gpu = [ProfilerActivity.CUDA] if self._job.world.device.type == "cuda" else []
        return [ProfilerActivity.CPU, *on_gpu]

    def _take(self, step: int, recorded: profile) -> None:
        """Writes the trace of a step, and keeps its calls for the table."""
        events = recorded.events() or []
        device = DeviceType.CUDA if self._job.world.device.type == "cuda" else DeviceType.CPU
        self._calls += _calls(events, device)
        self._phases += [(name, end - start) for start, end, name in _spans(events, DeviceType.CPU)]
        self._done.append(step)
        path = self._job.run.profile / f"rank-{self._job.world.rank}-step-{step}.trace.json.gz"
        self._write(path, lambda: _write_trace(recorded, path))

    def close(self) -> None:
        """Writes the table of the steps that were profiled and are in no table yet."""
        if not self._done:
            return
        kernels = kernel_lines(self._calls, _own_kernels())
        table: Profile = {
            "steps": self._done,
            "rank": self._job.world.rank,
            "host": socket.gethostname(),
            "device": torch.cuda.get_device_name() if self._job.world.device.type == "cuda" else "cpu",
            "seconds": self._seconds,
            "phases": phase_lines(self._phases),
            "kinds": kind_lines(kernels),
            "kernels": kernels,
        }
        name = f"rank-{table['rank']}-steps-{self._done[0]}-{self._done[-1]}"
        for path, content in (
            (self._job.run.profile / f"{name}.json", json.dumps(table, indent=1)),
            (self._job.run.profile / f"{name}.txt", as_text(table)),
        ):
            self._write(path, partial(atomic_write, path, content))
        self._done, self._calls, self._phases, self._seconds = [], [], [], 0.0

    def _write(self, path: Path, action: Callable[[], None]) -> None:
        """Writes a file of the profile, for people: a full disk is a warning."""
        if self._job.world.is_main:
            self._job.owner.check_run_folder()
        if if_possible(partial(path.parent.mkdir, exist_ok=True), str(path.parent)):
            if_possible(action, str(path))


def _write_trace(recorded: profile, path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="fastvit-") as folder:
        whole = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(whole))
        with (
            atomic_writer(path) as file,
            gzip.open(file, "wb", compresslevel=3) as packed,
            open(whole, "rb") as content,
        ):
            shutil.copyfileobj(content, packed)


@contextmanager
def _named_phases(watchdog: Watchdog) -> Iterator[None]:
    """Makes each phase of a step a range of the trace."""
    with ExitStack() as current:
        others = watchdog.on_phase

        def begin(name: str) -> None:
            others(name)
            current.close()
            current.enter_context(record_function(f"{_PHASE}{name}"))

        watchdog.on_phase = begin
        try:
            yield
        finally:
            watchdog.on_phase = others


def _spans(events: Iterable[Any], device: DeviceType) -> list[tuple[float, float, str]]:
    """Beginning, end and name of each phase as a device saw it, in seconds and in order."""
    return sorted(
        (event.time_range.start / 1e6, event.time_range.end / 1e6, event.name.removeprefix(_PHASE))
        for event in events
        if event.device_type == device and event.name.startswith(_PHASE)
    )


def _calls(events: Iterable[Any], device: DeviceType) -> Iterator[Call]:
    """The kernels that ran on the GPU, or the operators on the CPU, each with the phase in which it began."""
    spans = _spans(events, device)
    starts = [start for start, _, _ in spans]
    for event in events:
        if event.device_type != device or event.is_user_annotation or event.name.startswith(_PHASE):
            continue
        began = event.time_range.start / 1e6
        number = bisect_right(starts, began) - 1
        phase = spans[number][2] if number >= 0 and began <= spans[number][1] else ""
        seconds = event.self_cpu_time_total if device == DeviceType.CPU else event.time_range.elapsed_us()
        yield Call(event.name, phase, seconds / 1e6)


def _own_kernels() -> set[str]:
    """Names of the Triton kernels of fastvit_kernels, as a GPU's profile has them."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("fastvit_kernels")]
    return {
        value.__name__
        for module in modules
        for value in vars(module).values()
        if isinstance(value, KernelInterface) and hasattr(value, "__name__")
    }
