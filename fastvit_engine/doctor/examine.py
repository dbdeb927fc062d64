"""Runs the checks, on one machine or as one rank of a job, each within a time limit."""

import contextlib
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fastvit_engine.cores import core_share
from fastvit_engine.distributed.environment import launched_by_cluster
from fastvit_engine.doctor.findings import Finding, Group, Status
from fastvit_engine.doctor.isolated import Isolated, Send, run_isolated, stopping
from fastvit_engine.doctor.nodes import Node, Shared, compare, exchange, name_rendezvous
from fastvit_engine.errors import UserError
from fastvit_engine.shown import say

if TYPE_CHECKING:
    from fastvit_engine.config import Config

_links = Group("links")
_NODE_SECONDS = 150.0  # of all checks of a node together, at most
_PATIENCE = 200.0  # seconds that a node waits for the checks of the others
_LINK_SECONDS = 90.0
_CPU_RANKS = 2  # processes that measure the links of a machine without GPUs


@dataclass(frozen=True)
class Request:
    """What a run would use."""

    config: "Config | None"  # None if the packages that read one are not installed
    out: str  # the run folder
    classes_known: bool  # whether somebody has set model.num_classes


@dataclass(frozen=True)
class Gpus:
    """What PyTorch shows."""

    count: int = 0
    name: str | None = None


@dataclass(frozen=True)
class Check:
    """A group of checks."""

    name: str
    run: Callable[[Request, Gpus], Iterable[Finding]]
    seconds: float
    needs_torch: bool = True


def examine(request: Request, tell: Callable[[str], None] = lambda line: None) -> list[Shared] | None:
    """The findings of this machine, or of all nodes of the job that a launcher has started.

    Returns None on a rank that does not report. `tell` is called with what is being checked.
    """
    try:
        name_rendezvous(os.environ, _first_of_slurm)
        launched = launched_by_cluster()
    except UserError as error:
        return compare([_node([_links.refused("launcher", error), *_of_node(request, tell)])])
    if not launched:
        return compare([_node([*_of_node(request, tell), *_of_links(tell)])])
    leads = os.environ["LOCAL_RANK"] == "0"
    own = _node(list(_of_node(request, tell))) if leads else None
    return _with_others(own)


# ---- this node


def _of_node(request: Request, tell: Callable[[str], None]) -> Iterator[Finding]:
    deadline = time.monotonic() + _NODE_SECONDS
    has_torch, gpus, left_out = True, Gpus(), []
    for check in CHECKS:
        if check.needs_torch and not has_torch:
            left_out.append(check.name)
            continue
        tell(f"checking {check.name}")
        seconds = max(1.0, min(check.seconds, deadline - time.monotonic()))
        findings = run_check(check.name, partial(check.run, request, gpus), seconds)
        yield from findings
        if check.name == "software":
            has_torch = any(one.subject == "import torch" and one.status != Status.PROBLEM for one in findings)
            gpus = _load_torch() if has_torch else gpus
    if left_out:
        advice = "install torch first, and run this again"
        yield Group("software").note("left out", f"not checked without torch: {', '.join(left_out)}", advice)


def run_check(name: str, check: Callable[[], Iterable[Finding]], seconds: float) -> list[Finding]:
    """The findings of a group, with another one if it hung, crashed or failed."""

    def send_all(send: Send) -> None:
        for finding in check():
            send(finding.to_dict())

    outcome = run_isolated(send_all, seconds)
    findings = [Finding.from_dict(message) for message in outcome.messages]
    if outcome.busy:
        found = f"slow: {outcome.failure}, and was still computing; {os.getloadavg()[0]:.0f} processes want a core"
        advice = "run this again when the machine has less to do"
        findings.append(Group(name).warning(f"rest of {name}", found, advice))
    elif outcome.failure is not None:
        found = f"could not be checked: {outcome.failure}"
        advice = "fix what it names, or install what is missing, and run this again"
        if not outcome.timely:
            advice = _HANGS.get(name, "see whether a disk or a driver hangs (dmesg)")
        findings.append(Group(name).problem(f"rest of {name}", found, advice))
    return findings


_HANGS = {
    "software": "see that the disk with the Python environment answers",
    "disks": "see which of the folders hangs (df), and bring its disk back",
    "data": "see that the store or the disk with the shards answers, and try again",
    "GPUs": "see what nvidia-smi and `dmesg | grep NVRM` say, or take another node",
}


def _load_torch() -> Gpus:
    """Imports PyTorch, so that the checks that follow find it in memory, and asks one of them for the GPUs."""
    with contextlib.suppress(Exception):  # it has just been imported in a process of its own
        import torch  # noqa: F401

    def ask(send: Send) -> None:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        send({"count": count, "name": torch.cuda.get_device_name(0) if count else None})

    messages = run_isolated(ask, 60.0).messages
    return Gpus(**messages[0]) if messages else Gpus()


def _software(request: Request, gpus: Gpus) -> Iterable[Finding]:
    from fastvit_engine.doctor.software import check_software

    return check_software()


def _host(request: Request, gpus: Gpus) -> Iterable[Finding]:
    from fastvit_engine.doctor.host import check_host

    return check_host(_processes(gpus), _workers(request.config), gpus.count)


def _workers(config: "Config | None") -> int:
    """Data workers of each process. A run fits them to the cores if it may choose, but takes one at least."""
    if config is None:
        return 0
    return 1 if config.data.num_workers is None and config.data.order != "stream" else config.data.workers


def _disks(request: Request, gpus: Gpus) -> Iterable[Finding]:
    from fastvit_engine.doctor.disks import check_disks, folders_of

    config = request.config
    if config is None:
        return check_disks(folders_of(request.out, None, None), {})
    folders = folders_of(request.out, config.data.cache, config.checkpoint.path)
    return check_disks(folders, _needed_room(config, folders))


def _needed_room(config: "Config", folders: dict[str, str]) -> dict[str, int]:
    """Two checkpoints where they go; the shard cache its limit."""
    needs = {}
    with contextlib.suppress(UserError):  # of a model that cannot be
        needs["checkpoints" if config.checkpoint.path else "run folder"] = 2 * checkpoint_bytes(config)
    if config.data.cache_gb:
        needs["shard cache"] = int(config.data.cache_gb * 1e9)
    return {name: max(2**30, size) for name, size in needs.items() if name in folders}


def checkpoint_bytes(config: "Config") -> int:
    """About the size of a checkpoint: fp32 weights, their average if there is one, and the optimizer's state.

    Counts the large matrices only: to count all parameters takes PyTorch, whose import may take as long as this check.
    So it is 0 for a model of timm, whose matrices only timm knows.

    Raises UserError if the model cannot be.
    """
    from fastvit_engine.config.model_shape import resolve_shape
    from fastvit_engine.config.timm_model import is_timm
    from fastvit_engine.engine.optimizers.state import STATE_BYTES

    if is_timm(config.model):
        return 0
    shape, optimizer = resolve_shape(config.model), config.optimizer
    width, hidden = shape.width, shape.mlp_dim
    block: dict[str, tuple[int, ...]] = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    block |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    matrices = [(f"blocks.0.{name}.weight", size) for name, size in block.items()] * shape.depth
    if shape.is_transformer:
        matrices.append(("patch_embed.proj.weight", (width, *shape.patch_inputs)))
    if shape.resnet is not None:
        matrices += [(f"{one.name}.weight", one.shape) for one in shape.resnet.convolutions()]
    matrices.append(("head.weight", (config.model.num_classes, width)))
    learning = matrices[-1:] if optimizer.frozen == "backbone" else matrices
    copies = 1 if config.ema.decay is None else 2
    weights = 4 * copies * sum(math.prod(size) for _, size in matrices)
    return weights + sum(STATE_BYTES[optimizer.kind](optimizer, *matrix) for matrix in learning)


def _gpus(request: Request, gpus: Gpus) -> Iterable[Finding]:
    from fastvit_engine.doctor.gpus import check_gpus

    return check_gpus()


def _compilers(request: Request, gpus: Gpus) -> Iterable[Finding]:
    from fastvit_engine.doctor.compilers import check_compilers

    return check_compilers(request.config.deepspeed if request.config else {})


def _kernels(request: Request, gpus: Gpus) -> Iterable[Finding]:
    from fastvit_engine.doctor.kernels import check_kernels

    return check_kernels(request.config.train.precision if request.config else "bf16")


def _data(request: Request, gpus: Gpus) -> Iterable[Finding]:
    if request.config is None:
        return
    from fastvit_engine.doctor.data import check_data
    from fastvit_engine.doctor.decoding import Needs

    needs = Needs(gpus.name, gpus.count, core_share())
    yield from check_data(request.config, request.out, needs, classes_known=request.classes_known)


CHECKS = (
    Check("software", _software, 90.0, needs_torch=False),
    Check("host", _host, 15.0, needs_torch=False),
    Check("disks", _disks, 15.0, needs_torch=False),
    Check("GPUs", _gpus, 90.0),
    Check("compilers", _compilers, 60.0),
    Check("kernels", _kernels, 60.0),
    Check("data", _data, 60.0),
)


def _processes(gpus: Gpus) -> int:
    """Of a run on this node."""
    started = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(started) if started.isdigit() else max(1, gpus.count)


def _node(findings: list[Finding]) -> Node:
    return Node(socket.gethostname(), tuple(findings))


# ---- links, and other nodes


def _of_links(tell: Callable[[str], None]) -> Iterator[Finding]:
    """Between the GPUs of this machine, or between two processes if it has none."""
    try:
        from fastvit_engine.distributed.supervise import free_port, rank_environment
    except ImportError:  # of torch, which is said above
        return
    gpus = _load_torch().count
    if gpus == 1:
        return
    tell("checking links")
    ranks, port = gpus or _CPU_RANKS, free_port()
    started = [Isolated(partial(_measure, rank_environment(rank, ranks, port)), _LINK_SECONDS) for rank in range(ranks)]
    with stopping(started):
        yield from _judged(started[0])


def _judged(measuring: Isolated) -> Iterator[Finding]:
    outcome = measuring.wait()
    yield from (Finding.from_dict(message) for message in outcome.messages if "subject" in message)
    if outcome.failure is not None:
        advice = "see what NCCL_DEBUG=INFO says, and which interface NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name"
        yield _links.problem("exchange", f"the processes could not exchange data: {outcome.failure}", advice)


def _measure(environment: dict[str, str], send: Send) -> None:
    from fastvit_engine.distributed.world import join_world
    from fastvit_engine.doctor.links import measure_links

    os.environ.update(environment)
    with join_world(_LINK_SECONDS) as world:
        for finding in measure_links(world):
            if world.is_main:
                send(finding.to_dict())


def _with_others(own: Node | None) -> list[Shared] | None:
    """The findings of all nodes, on rank 0. Only rank 0 fails a job, so that nothing ends it before it reports."""
    rank = int(os.environ["RANK"])
    meeting = Isolated(partial(_meet, own), _PATIENCE + _LINK_SECONDS)
    with stopping([meeting]):
        outcome = meeting.wait()
    if rank != 0:
        if own is not None and outcome.failure is not None:
            _say_alone(own, outcome.failure)
        return None
    assert own is not None
    messages = [message for message in outcome.messages if "host" in message]
    nodes = [Node(one["host"], tuple(map(Finding.from_dict, one["findings"])), one["skew"]) for one in messages] or [
        own
    ]
    found = [Finding.from_dict(message) for message in outcome.messages if "subject" in message]
    if outcome.failure is not None:
        what = "the processes could not exchange data" if messages else "the nodes did not find each other"
        advice = "see what the other ranks and their hosts say, and that this one can be reached (address, firewall)"
        found.append(_links.problem("exchange", f"{what}: {outcome.failure}", advice))
    hosts = tuple(node.host for node in nodes)
    return [*compare(nodes), *(Shared(one, hosts) for one in found)]


def _say_alone(own: Node, failure: str) -> None:
    """What a node has to say whose findings may not have reached rank 0."""
    say(f"fastvit: doctor: {own.host} could not take part to the end: {failure}", file=sys.stderr)
    for one in own.findings:
        if one.status == Status.PROBLEM:
            say(f"fastvit: doctor: {own.host}: {one.subject}: {one.found} -> {one.advice}", file=sys.stderr)


def _meet(own: Node | None, send: Send) -> None:
    """Joins the other ranks, and sends what all of them have found, as rank 0."""
    from fastvit_engine.distributed.rendezvous import check_rendezvous
    from fastvit_engine.distributed.roll_call import PeerEnded, tell_that_this_rank_ends
    from fastvit_engine.distributed.world import join_world
    from fastvit_engine.doctor.links import measure_links

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def introduce(store: Any) -> None:
        for node in exchange(store, rank, size, own):
            send({"host": node.host, "findings": [one.to_dict() for one in node.findings], "skew": node.skew})

    try:
        check_rendezvous(patience=_PATIENCE)
        with join_world(_PATIENCE, introduce=introduce) as world:
            if world.size > 1:
                for finding in measure_links(world):
                    if world.is_main:
                        send(finding.to_dict())
    except UserError as error:  # which is raised before a rank joins
        if not isinstance(error, PeerEnded):
            tell_that_this_rank_ends(str(error))
        raise


def _first_of_slurm(hosts: str) -> str | None:
    """The first of the hosts that SLURM lists as "node[1-4]"."""
    try:
        command = ["scontrol", "show", "hostnames", hosts]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)
