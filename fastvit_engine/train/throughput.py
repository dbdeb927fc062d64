"""How fast a run is: images per second, share of the hardware's peak (MFU), share of time spent waiting for data."""

import resource
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fastvit_engine.cores import core_share
from fastvit_engine.data import Batch
from fastvit_engine.distributed.world import World
from fastvit_engine.sizing.gpus import DATASHEET_PEAK, known_gpu

_SIZE = 1024  # of the matrices whose product measures a peak


@dataclass(frozen=True)
class Peak:
    """Matrix-product FLOP/s of all processes together, and where the figure comes from."""

    flops: float
    source: str


def peak_flops(world: World, precision: str) -> Peak:
    """The datasheet's figure for a known GPU in bf16 or fp16, else a short matrix product timed here; collective.

    precision: `number_format` of a run. With FP8 it is that of bf16 too, so that utilisation compares with bf16's.
    """
    if world.device.type == "cuda" and precision != "fp32":
        name = torch.cuda.get_device_name(world.device)
        if (known := known_gpu(name)) is not None:
            return Peak(DATASHEET_PEAK[known] * world.size, f"datasheet, dense {precision} on {name}")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    world.barrier()  # all processes at once, as in training: they share the machine
    if world.device.type == "cuda":
        own, clock = 2 * _SIZE**3 / _seconds_on_gpu(world.device, dtype), ""
    else:
        cores = min(torch.get_num_threads(), core_share() / len(world.node_ranks))
        own, clock = cores * core_peak_flops(dtype), ", by CPU time"
    source = f"measured: fastest {precision} product of {_SIZE} x {_SIZE} matrices, all processes at once{clock}"
    return Peak(world.sum([own]).item(), source)


def core_peak_flops(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest matrix product on one core of this CPU."""
    return 2 * _SIZE**3 / _core_seconds(dtype)


def _seconds_on_gpu(device: torch.device, dtype: torch.dtype) -> float:
    """Of the fastest product, on a GPU that the datasheets do not know or in fp32."""
    a, b = (torch.randn(_SIZE, _SIZE, device=device).to(dtype) for _ in range(2))
    fastest, end = float("inf"), time.perf_counter() + 0.3  # in which it loads libraries and raises its clocks
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def _core_seconds(dtype: torch.dtype) -> float:
    """CPU time of the fastest product, over all threads: other programs that want the cores too do not lengthen it."""
    a, b = (torch.randn(_SIZE, _SIZE).to(dtype) for _ in range(2))
    products: list[float] = []
    end = time.perf_counter() + 0.1
    while len(products) < 3 or time.perf_counter() < end:  # the first also loads libraries
        start = time.process_time()
        a @ b
        products.append(time.process_time() - start)
    return min(products)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Stopwatch:
    """Training time since the last `read`, leaving out what runs inside `paused()` (evaluation, checkpoints)."""

    def __init__(self, device: torch.device, seconds_before: float = 0.0) -> None:
        self.device = device
        self.total = seconds_before  # training seconds up to the last `read`, over restarts
        self.waited = 0.0
        self.start = time.perf_counter()

    def timed(self, batches: Iterator[Batch]) -> Generator[Batch]:
        """The batches; the time until each comes counts as waiting for data."""
        while True:
            start = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - start
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        self.start += time.perf_counter() - start

    @property
    def so_far(self) -> float:
        """Training seconds up to now, without waiting for the device."""
        return self.total + time.perf_counter() - self.start

    def read(self) -> tuple[float, float]:
        """(seconds since the last `read`, seconds of them spent waiting for data)."""
        self._synchronize()
        now = time.perf_counter()
        elapsed, waited = now - self.start, self.waited
        self.total += elapsed
        self.start, self.waited = now, 0.0
        return elapsed, waited

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
