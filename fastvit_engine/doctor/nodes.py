"""Brings the findings of several nodes together, compares their clocks and versions, and names the slowest of them."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fastvit_engine.doctor.findings import Finding, Group, Status
from fastvit_engine.observe.units import counted, format_duration

if TYPE_CHECKING:
    import torch.distributed as dist

_group = Group("nodes")
_ROUNDS = 3
_SKEW, _LARGE_SKEW = 1.0, 300.0  # seconds; signatures of object stores hold for 15 minutes
_SLOWEST = 0.7  # of the median: a node that is slower is named in a warning
_LISTED = 4  # hosts


@dataclass(frozen=True)
class Node:
    """What a node has found, and how far its clock is ahead of rank 0's, in seconds."""

    host: str
    findings: tuple[Finding, ...]
    skew: float = 0.0


@dataclass(frozen=True)
class Shared:
    """A finding, and the hosts that it is of."""

    finding: Finding
    hosts: tuple[str, ...]


def exchange(
    store: "dist.Store", rank: int, world: int, own: Node | None, clock: Callable[[], float] = time.time
) -> list[Node]:
    """The nodes of all ranks, as rank 0; nothing as another. `own`: that of this rank, if it speaks for a node."""
    content = None if own is None else {"host": own.host, "findings": [one.to_dict() for one in own.findings]}
    store.set(f"node/{rank}", json.dumps(content))
    skews = _compare_clocks(store, rank, world, clock)
    if rank != 0:
        store.get("exchanged")  # waits: rank 0 may hold the store
        return []
    found = []
    for other in range(world):
        node = json.loads(store.get(f"node/{other}"))
        if node is not None:
            findings = tuple(Finding.from_dict(one) for one in node["findings"])
            found.append(Node(node["host"], findings, skews[other]))
    store.set("exchanged", "")
    return found


def _compare_clocks(store: "dist.Store", rank: int, world: int, clock: Callable[[], float]) -> list[float]:
    """How far the clock of each rank is ahead of rank 0's, as rank 0.

    Rank 0 tells its time to ranks that wait for it. What the network adds is the same sign always, so that the least of
    several rounds is the nearest.
    """
    least = [float("inf")] * world
    for number in range(_ROUNDS):
        store.set(f"waits/{number}/{rank}", "")
        if rank != 0:
            told = float(store.get(f"time/{number}"))
            least[rank] = min(least[rank], clock() - told)
            continue
        for other in range(world):
            store.get(f"waits/{number}/{other}")
        time.sleep(0.02)  # those that have said so begin to wait
        store.set(f"time/{number}", repr(clock()))
    if rank != 0:
        store.set(f"skew/{rank}", repr(least[rank]))
        return []
    return [0.0, *(float(store.get(f"skew/{other}")) for other in range(1, world))]


def compare(nodes: Sequence[Node]) -> list[Shared]:
    """The findings of all nodes, those that are alike once; and what differs between nodes."""
    hosts = tuple(node.host for node in nodes)
    by_subject: dict[tuple[str, str], list[tuple[str, Finding]]] = {}
    for node in nodes:
        for finding in node.findings:
            by_subject.setdefault((finding.group, finding.subject), []).append((node.host, finding))
    shared: list[Shared] = []
    for found in by_subject.values():
        shared += _alike(found)
    if len(nodes) > 1:
        shared += [Shared(one, hosts) for one in (*_different(by_subject, len(nodes)), _clocks(nodes))]
        shared += [Shared(one, hosts) for found in by_subject.values() if (one := _slow(found)) is not None]
    return shared


def _alike(found: Sequence[tuple[str, Finding]]) -> list[Shared]:
    """One subject on several hosts: a line for each that needs advice, and one for all that are well."""
    well = [(host, one) for host, one in found if one.status == Status.OK]
    groups: dict[tuple[str, str, str], list[tuple[str, Finding]]] = {}
    for host, one in found:
        if one.status != Status.OK:
            groups.setdefault((one.status, one.found, one.advice), []).append((host, one))
    shared = [Shared(group[0][1], tuple(host for host, _ in group)) for group in groups.values()]
    if well:
        host, one = min(well, key=lambda pair: pair[1].figures.get(pair[1].speed, 0.0))
        if len({other.found for _, other in well}) > 1:
            label = "least of" if one.speed else "one of"
            one = replace(one, found=f"{one.found} ({label} {counted(len(well), 'node')}: {host})")
        shared.insert(0, Shared(one, tuple(host for host, _ in well)))
    return shared


def _different(by_subject: Mapping[tuple[str, str], Sequence[tuple[str, Finding]]], count: int) -> list[Finding]:
    """What should be the same on all nodes and is not."""
    wrong = []
    for (group, subject), found in by_subject.items():
        values: dict[str, list[str]] = {}
        for host, one in found:
            if one.same:
                values.setdefault(one.same, []).append(host)
        if len(values) < 2:
            continue
        differs = "differs between nodes: " + "; ".join(f"{value} on {names(hosts)}" for value, hosts in values.items())
        if group == "GPUs":
            advice = "run on nodes that are alike: the slowest sets the pace, and the smallest the batch"
            wrong.append(_group.warning(subject, differs, advice))
        else:
            advice = "install the same on every node, from one constraints file or one container image"
            wrong.append(_group.problem(subject, differs, advice))
    if not wrong:
        wrong.append(_group.ok("versions", f"the same on {count} nodes"))
    return wrong


def _clocks(nodes: Sequence[Node]) -> Finding:
    middle = sorted(node.skew for node in nodes)[len(nodes) // 2] if len(nodes) > 2 else nodes[0].skew
    others = "most nodes" if len(nodes) > 2 else nodes[0].host
    off = {node.host: node.skew - middle for node in nodes}
    worst = max(off, key=lambda host: abs(off[host]))
    figures = {"seconds": abs(off[worst])}
    wrong = [f"{host} is {format_duration(abs(skew))} {'ahead of' if skew > 0 else 'behind'} {others}"
             for host, skew in off.items() if abs(skew) > _SKEW]  # fmt: skip
    if not wrong:
        return _group.ok("clocks", f"within {abs(off[worst]):.2f} s of each other", figures=figures)
    more = f"; and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
    found = f"{'; '.join(wrong[:_LISTED])}{more}"
    advice = "synchronise them (chronyc makestep, or timedatectl set-ntp true)"
    if abs(off[worst]) > _LARGE_SKEW:
        return _group.problem(
            "clocks", f"{found}: object stores refuse requests that are signed at another time", advice, figures=figures
        )
    return _group.warning("clocks", f"{found}: logs and events do not line up", advice, figures=figures)


def _slow(found: Sequence[tuple[str, Finding]]) -> Finding | None:
    """The nodes whose figure is much less than the others'."""
    rates = {host: one.figures[one.speed] for host, one in found if one.speed in one.figures}
    if len(rates) < 2 or found[0][1].group == "disks":  # of which each node needs enough, not as much
        return None
    median = sorted(rates.values())[len(rates) // 2]  # of two, the faster one
    slow = [host for host, rate in rates.items() if rate < _SLOWEST * median]
    if not slow:
        return None
    subject = found[0][1].subject
    listed = ", ".join(f"{host} ({100 * rates[host] / median:.0f} %)" for host in slow[:_LISTED])
    more = f" and {len(slow) - _LISTED} more" if len(slow) > _LISTED else ""
    return _group.warning(
        f"slow: {subject}",
        f"much less than the median of the nodes: {listed}{more}",
        "see what else runs there, or leave the node out: the slowest sets the pace",
    )


def names(hosts: Sequence[str]) -> str:
    """Hosts, by name as far as a line can hold them."""
    more = f" and {len(hosts) - _LISTED} more" if len(hosts) > _LISTED else ""
    return ", ".join(hosts[:_LISTED]) + more


def name_rendezvous(environment: dict[str, str] | os._Environ[str], first_host: Callable[[str], str | None]) -> None:
    """Sets MASTER_ADDR and MASTER_PORT for several tasks of srun that were started without them.

    first_host: of a list of hosts as SLURM writes it.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    if "SLURM_STEP_ID" not in environment or "MASTER_ADDR" in environment or "RANK" in environment:
        return
    if not tasks.isdigit() or int(tasks) < 2:
        return
    host = first_host(environment.get("SLURM_STEP_NODELIST", ""))
    if host is not None:
        port = 29500 + (int(environment.get("SLURM_JOB_ID", "0")) + int(environment["SLURM_STEP_ID"])) % 1000
        environment.update(MASTER_ADDR=host, MASTER_PORT=str(port))
