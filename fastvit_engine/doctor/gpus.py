"""Checks the GPUs of this node: what they are, who else uses them, how they are connected, and how fast they copy."""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from fastvit_engine.doctor.findings import Finding, Group
from fastvit_engine.doctor.nvidia import (
    Driver,
    DriverTrouble,
    GpuProcess,
    ask_driver,
    links_between_gpus,
    processes_on_gpus,
)
from fastvit_engine.observe.units import counted, format_bytes

_group = Group("GPUs")
_COPIED = 2**28  # bytes
_SLOW = 0.7  # of the median: a GPU or a pair that copies slower is named
_FREE = 0.9  # of the memory: less is in use by somebody


def check_gpus() -> Iterator[Finding]:
    try:
        driver = ask_driver()
    except DriverTrouble as trouble:
        yield _group.problem(
            "driver", str(trouble), "see what nvidia-smi and `dmesg | grep NVRM` say, or take another node"
        )
        return
    if driver is not None and driver.gpus:
        yield _check_driver(driver)
        yield from _check_compute_mode(driver)
        yield from _check_other_processes(driver)
    if not torch.cuda.is_available():
        yield _why_none(driver)
        return
    yield from _check_memory()
    if driver is not None and torch.cuda.device_count() > 1:
        yield from _check_links(driver)
    yield from _check_copies()


def _check_driver(driver: Driver) -> Finding:
    newest = ".".join(map(str, driver.cuda)) if driver.cuda else "an unknown version"
    found = f"{driver.version}, for CUDA up to {newest}"
    built = torch.version.cuda
    if built and driver.cuda and int(built.split(".")[0]) > driver.cuda[0]:
        return _group.problem(
            "driver",
            f"{found}; torch {torch.__version__} was built for CUDA {built}, which is newer",
            f"update the driver, or install a build of torch for CUDA {driver.cuda[0]}",
            same=driver.version,
        )
    return _group.ok("driver", found, same=driver.version)


def _why_none(driver: Driver | None) -> Finding:
    """What keeps PyTorch from the GPUs; a note on a machine without any."""
    if driver is None or not driver.gpus:
        return _group.note(
            "GPUs", "there is none here: training runs on the CPU", "start on a node with GPUs if it should not"
        )
    found = f"the driver shows {counted(len(driver.gpus), 'GPU')} and PyTorch sees none"
    if torch.version.cuda is None and torch.version.hip is None:
        return _group.problem(
            "GPUs",
            f"{found}: torch {torch.__version__} was built without CUDA",
            "install a build of torch for CUDA: training would run on the CPU",
        )
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        visible = os.environ["CUDA_VISIBLE_DEVICES"]
        return _group.problem(
            "GPUs",
            f"{found}: CUDA_VISIBLE_DEVICES is {visible!r}",
            "unset CUDA_VISIBLE_DEVICES, or ask the scheduler for GPUs (SLURM: --gpus-per-node)",
        )
    try:
        torch.cuda.init()
        reason = "it does not say why"
    except (RuntimeError, AssertionError) as error:
        reason = next(iter(str(error).splitlines()), "it does not say why")
    return _group.problem("GPUs", f"{found}: {reason}", "see what nvidia-smi says, or take another node")


def _check_compute_mode(driver: Driver) -> Iterator[Finding]:
    shut = [gpu.index for gpu in driver.gpus if gpu.compute_mode == "Prohibited"]
    if shut:
        yield _group.problem(
            "compute mode", f"GPU {_listed(shut)} lets no process compute (Prohibited)", "sudo nvidia-smi -c DEFAULT"
        )
    elif any(gpu.compute_mode == "Exclusive_Process" for gpu in driver.gpus):
        yield _group.note(
            "compute mode",
            "a GPU lets one process compute at a time (Exclusive_Process)",
            "nothing, unless another program is to share a GPU with a run: sudo nvidia-smi -c DEFAULT",
        )


def _check_other_processes(driver: Driver) -> Iterator[Finding]:
    try:
        processes = processes_on_gpus()
    except DriverTrouble:  # older drivers know no such query
        return
    index = {gpu.uuid: gpu.index for gpu in driver.gpus}
    here = [process for process in processes if process.uuid in index]
    if not here:
        yield _group.ok("other processes", "none on the GPUs that the driver shows here")
        return
    listed = "; ".join(_describe(process, index) for process in here[:4])
    more = f"; and {len(here) - 4} more" if len(here) > 4 else ""
    yield _group.warning(
        "other processes",
        f"{counted(len(here), 'process', 'processes')} on the GPUs: {listed}{more}",
        "end them if they are yours, or take other GPUs: a run shares memory and speed with them",
    )


def _describe(process: GpuProcess, index: Mapping[str, int]) -> str:
    return (
        f"process {process.pid} ({process.name.rpartition('/')[2]}) has {format_bytes(process.memory)} of "
        f"GPU {index[process.uuid]}"
    )


def _check_memory() -> Iterator[Finding]:
    """Also what they are."""
    names, busy = [], []
    for device in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(device)
        try:
            free, total = torch.cuda.mem_get_info(device)
        except RuntimeError as error:
            yield _group.problem(
                f"GPU {device}",
                f"{properties.name} cannot be used: {next(iter(str(error).splitlines()), 'no reason given')}",
                f"leave it out (CUDA_VISIBLE_DEVICES without {device}), or take another node",
            )
            continue
        names.append(f"{properties.name}, {format_bytes(total)}")
        if free < _FREE * total:
            busy.append(f"GPU {device} has {format_bytes(free)} of {format_bytes(total)} free")
    kinds = {name: names.count(name) for name in names}
    found = "; ".join(f"{count} x {name}" for name, count in kinds.items())
    if len(kinds) > 1:
        yield _group.warning(
            "GPUs",
            f"of several kinds: {found}",
            "use those of one kind (CUDA_VISIBLE_DEVICES): the slowest sets the pace, the smallest the batch",
            same=found,
        )
    elif kinds:
        yield _group.ok("GPUs", found, same=found)
    if busy:
        yield _group.warning("free memory", "; ".join(busy), "end what uses it: nvidia-smi lists the processes")
    elif kinds:
        yield _group.ok("free memory", f"more than {100 * _FREE:.0f} % of each")


def _check_links(driver: Driver) -> Iterator[Finding]:
    """NVLink or PCIe, as the driver says; and whether PyTorch may copy directly."""
    devices = range(torch.cuda.device_count())
    apart = [(a, b) for a, b in itertools.permutations(devices, 2) if not torch.cuda.can_device_access_peer(a, b)]
    try:
        links = links_between_gpus()
    except DriverTrouble:
        links = {}
    kinds = {"NVLink" if link.startswith("NV") else f"PCIe ({link})" for link in links.values()}
    found = " and ".join(sorted(kinds)) or "unknown to the driver"
    if apart:
        yield _group.warning(
            "links between GPUs",
            f"{found}; GPUs {apart[0][0]} and {apart[0][1]} cannot read each other's memory"
            + (f", nor can {len(apart) - 1} other pairs" if len(apart) > 1 else ""),
            "NCCL goes through host memory, which is slower: see `nvidia-smi topo -m`, and turn off ACS or IOMMU if "
            "this machine is yours",
        )
    elif len(kinds) > 1 and "NVLink" in kinds:
        yield _group.warning(
            "links between GPUs",
            f"some pairs have NVLink and others do not: {found}",
            "run on GPUs that are linked (CUDA_VISIBLE_DEVICES): see `nvidia-smi topo -m`",
        )
    else:
        yield _group.ok("links between GPUs", found)


def _check_copies() -> Iterator[Finding]:
    devices = range(torch.cuda.device_count())
    to_device = {f"GPU {device}": rate_to_device(device) for device in devices}
    yield judge_rates("host to GPU", to_device, "see that its PCIe link has full width: nvidia-smi -q -d PERFORMANCE")
    if len(devices) > 1:
        between = {f"GPU {a} to GPU {b}": rate_between(a, b) for a, b in itertools.permutations(devices, 2)}
        yield judge_rates("GPU to GPU", between, "see `nvidia-smi nvlink --status` and `nvidia-smi topo -m`")


def judge_rates(subject: str, rates: Mapping[str, float], advice: str) -> Finding:
    """Bytes per second by name; names those that are much slower than the others."""
    median, worst = statistics.median(rates.values()), min(rates, key=lambda name: rates[name])
    slow = [name for name, rate in rates.items() if rate < _SLOW * median]
    figures = {"bytes_per_second": rates[worst]}
    found = f"{format_bytes(rates[worst])}/s"
    if len(rates) > 1:
        found += f" at least ({worst}), {format_bytes(median)}/s in the median"
    if not slow:
        return _group.ok(subject, found, figures=figures, speed="bytes_per_second")
    named = ", ".join(f"{name} {format_bytes(rates[name])}/s" for name in slow[:4])
    more = f" and {len(slow) - 4} more" if len(slow) > 4 else ""
    found = f"slower than the others, whose median is {format_bytes(median)}/s: {named}{more}"
    return _group.warning(subject, found, advice, figures=figures, speed="bytes_per_second")


def rate_to_device(device: int) -> float:
    """Bytes per second from pinned host memory."""
    source = torch.empty(_COPIED, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(_COPIED, dtype=torch.uint8, device=f"cuda:{device}")
    return _best_rate(lambda: target.copy_(source, non_blocking=True), [device])


def rate_between(a: int, b: int) -> float:
    """Bytes per second from GPU `a` to GPU `b`."""
    source = torch.empty(_COPIED, dtype=torch.uint8, device=f"cuda:{a}")
    target = torch.empty(_COPIED, dtype=torch.uint8, device=f"cuda:{b}")
    return _best_rate(lambda: target.copy_(source, non_blocking=True), [a, b])


def _best_rate(copy: Callable[[], object], devices: Sequence[int]) -> float:
    fastest = float("inf")
    for _ in range(4):  # the first one makes what later ones use
        for device in devices:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        copy()
        for device in devices:
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - began)
    return _COPIED / fastest


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
