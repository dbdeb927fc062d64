"""Measures the links between the processes of a job: an all-reduce of all, of each node, and from node to node."""

import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from fastvit_engine.distributed.world import World
from fastvit_engine.doctor.findings import Finding, Group
from fastvit_engine.observe.units import counted, format_bytes

_group = Group("links")
_BYTES = {"cuda": 2**28, "cpu": 2**23}  # of a message
_SECONDS = 1.0  # of a measurement
_MOST = 20  # repetitions
_SLOW = 0.7  # of the median


def measure_links(world: World) -> Iterator[Finding]:
    """Collective; the same findings on every rank."""
    hosts = world.gather(socket.gethostname())
    leaders = [rank for rank, is_leader in enumerate(world.gather(os.environ["LOCAL_RANK"] == "0")) if is_leader]
    yield _all_reduce(world, len(leaders))
    if len(leaders) > 1:
        if world.size > len(leaders):
            yield _within_nodes(world, leaders, hosts)
        yield _between_nodes(world, leaders, hosts)


def _all_reduce(world: World, nodes: int) -> Finding:
    tensor = _message(world)
    seconds = _timed(world, lambda: dist.all_reduce(tensor), in_all=True)
    rate = 2 * (world.size - 1) / world.size * tensor.nbytes / seconds
    library = "NCCL" if world.device.type == "cuda" else "Gloo"
    where = f"{nodes} nodes" if nodes > 1 else "this machine"
    found = f"{format_bytes(rate)}/s by {library} on {world.size} processes of {where} (bus bandwidth)"
    return _group.ok("all-reduce", found, figures={"bytes_per_second": rate})


def _within_nodes(world: World, leaders: Sequence[int], hosts: Sequence[str]) -> Finding:
    """All nodes at the same time, each for itself."""
    ends = [*leaders[1:], world.size]
    groups = [dist.new_group(list(range(start, end))) for start, end in zip(leaders, ends, strict=True)]
    node = max(number for number, leader in enumerate(leaders) if leader <= world.rank)
    size = ends[node] - leaders[node]
    rate = 0.0
    if size > 1:
        tensor = _message(world)
        seconds = _timed(world, lambda: dist.all_reduce(tensor, group=groups[node]))
        rate = 2 * (size - 1) / size * tensor.nbytes / seconds
    rates = world.max([rate if number == node else 0.0 for number in range(len(leaders))]).tolist()
    known = {hosts[leader]: rate for leader, rate in zip(leaders, rates, strict=True) if rate}
    advice = "see what `fastvit doctor` says there of its GPUs and their links, or leave the node out"
    return judge_nodes("within nodes", known, "all-reduce within a node", advice)


def _between_nodes(world: World, leaders: Sequence[int], hosts: Sequence[str]) -> Finding:
    """Each node with the next one, in a ring; no node with two others at once."""
    count = len(leaders)
    edges = [(number, (number + 1) % count) for number in range(count if count > 2 else 1)]
    rates = [0.0] * len(edges)
    tensor = _message(world)
    received = torch.empty_like(tensor)
    for phase in range(3):
        for number, (a, b) in enumerate(edges):
            own = 2 if count % 2 and number == count - 1 else number % 2
            pair = (leaders[a], leaders[b])
            if own == phase and world.rank in pair:
                peer = pair[1] if world.rank == pair[0] else pair[0]
                seconds = _timed(world, lambda peer=peer: _swap(tensor, received, peer))  # type: ignore[misc]
                rates[number] = tensor.nbytes / seconds
        world.barrier()
    rates = world.max(rates).tolist()
    best = {
        hosts[leader]: max(rate for edge, rate in zip(edges, rates, strict=True) if number in edge)
        for number, leader in enumerate(leaders)
    }
    advice = "see its network card and cable (ethtool, ibstat), and which interface NCCL_SOCKET_IFNAME names there"
    return judge_nodes("between nodes", best, "from node to node, in both directions at once", advice)


def judge_nodes(subject: str, rates: dict[str, float], what: str, advice: str) -> Finding:
    """Bytes per second by host; names those that are much slower than the others."""
    slowest, median = min(rates, key=lambda host: rates[host]), statistics.median(rates.values())
    figures = {"bytes_per_second": rates[slowest]}
    slow = [host for host, rate in rates.items() if rate < _SLOW * median]
    if slow:
        listed = ", ".join(f"{host} ({format_bytes(rates[host])}/s)" for host in slow[:4])
        more = f" and {len(slow) - 4} more" if len(slow) > 4 else ""
        found = f"{what}: slower than the others, whose median is {format_bytes(median)}/s: {listed}{more}"
        return _group.warning(subject, found, advice, figures=figures)
    found = f"{what}: {format_bytes(median)}/s in the median of {counted(len(rates), 'node')}"
    return _group.ok(subject, f"{found}; {slowest} is slowest, {format_bytes(rates[slowest])}/s", figures=figures)


def _swap(sent: torch.Tensor, received: torch.Tensor, peer: int) -> None:
    operations = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
    for request in dist.batch_isend_irecv(operations):
        request.wait()


def _message(world: World) -> torch.Tensor:
    return torch.zeros(_BYTES[world.device.type] // 4, dtype=torch.float32, device=world.device)


def _timed(world: World, action: Callable[[], object], *, in_all: bool = False) -> float:
    """Seconds of an action that several ranks do together, in the mean; `in_all`: all ranks do it."""
    _clock(world, action)  # connections are made
    first = _clock(world, action)
    if not in_all:  # as others may not take part, nobody can agree on a number
        return min([first, *(_clock(world, action) for _ in range(3))])
    first = world.max([first]).item()
    times = max(1, min(_MOST, int(_SECONDS / first)))
    total = sum(_clock(world, action) for _ in range(times))
    return float(world.max([total]).item()) / times


def _clock(world: World, action: Callable[[], object]) -> float:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    began = time.perf_counter()
    action()
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter() - began
