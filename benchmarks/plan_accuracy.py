"""Compares the step times that `fastvit plan` predicts with those of real jobs, on slow networks of this machine.

    python -m benchmarks.plan_accuracy [--rounds N] [--out DIR]

A small ViT is trained by two or three processes, each in a network namespace of its own, whose cables let through a set
number of bytes per second, and delay every packet. Needs root. In each round every combination of ZeRO stage, link and
processes has one turn, and so has each stage with messages that are not sent: what a process computes when as many run
beside it, with DeepSpeed's copies and update. The prediction is made from that time, and from latency and bandwidth as
the processes find them before each turn, by a tiny gather and two all-reduces, since the process that plays the cable
takes some time of its own. Nothing else is fitted.

What TCP does of its own is not predicted, so the hosts' TCP does little: it has windows that hold a message from the
start, and sends nothing again because an acknowledgement waits behind a message. BBR, where it is the default, would
send at the pace of the cable before for seconds.

The results are written after each round, and a command that is repeated continues.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.machine import ROOT
from benchmarks.step_overhead import describe_machine
from fastvit_engine.config import Config
from fastvit_engine.data.stream.batch_split import BatchSplit
from fastvit_engine.distributed.world import World, join_world
from fastvit_engine.engine.build import build_engine
from fastvit_engine.engine.protocol import TrainingEngine
from fastvit_engine.files import atomic_write
from fastvit_engine.models import build_vit, parameter_count
from fastvit_engine.sizing.communication import Network
from fastvit_engine.sizing.interconnects import Interconnect, Link
from fastvit_engine.sizing.step_time import StepTime, play
from fastvit_engine.sizing.traffic import Settings, step_events
from tests.cluster.hosts import Hosts, missing

ROUNDS = 5
STEPS = 4  # of a turn, after one that is not counted
IMAGES = 8  # of a process, in each pass
PASSES = {0: 1, 1: 2, 2: 2, 3: 1}  # of a step, by stage
ALLOWED = 0.15
TINY, SMALL, LARGE = 16, 400_000, 4_000_000  # bytes of the messages that find out latency and bandwidth
TCP = {
    "net.ipv4.tcp_congestion_control": "reno",
    "net.ipv4.tcp_slow_start_after_idle": "0",
    "net.ipv4.tcp_early_retrans": "0",
    "net.ipv4.tcp_rmem": "4096 16777216 33554432",
    "net.ipv4.tcp_wmem": "4096 16777216 33554432",
}
STILL = 0.5  # seconds
ROUTE = ("initcwnd", "10000", "initrwnd", "10000", "rto_min", "5s")
NAME = "plan_accuracy"


class Cable(NamedTuple):
    """Of each process."""

    megabytes_per_second: float  # 0: as many as come
    milliseconds: float  # from one process to another

    @property
    def title(self) -> str:
        return f"{self.megabytes_per_second:g} MB/s, {self.milliseconds:g} ms"


class Case(NamedTuple):
    """One combination. cable: None for a turn without messages."""

    stage: int
    processes: int
    cable: Cable | None

    @property
    def key(self) -> str:
        return f"stage {self.stage}, {self.processes} processes, {self.cable.title if self.cable else 'nothing sent'}"


FREE = Cable(0, 0)
CABLES = ((Cable(50, 0.2), 2), (Cable(25, 2), 3), (Cable(12, 8), 2))  # and the processes that have them
CASES = tuple(Case(stage, processes, cable) for stage in PASSES for cable, processes in CABLES)
ALONE = tuple(Case(stage, processes, None) for stage in PASSES for processes in (2, 3))


def config_of(stage: int) -> Config:
    zero = {"overlap_comm": False, "reduce_bucket_size": 500_000, "stage3_prefetch_bucket_size": 900_000}
    zero |= {"stage3_max_live_parameters": 1_800_000, "stage3_max_reuse_distance": 900_000}
    return Config.model_validate(
        {
            "model": {"name": "Ti/16", "image_size": 96, "num_classes": 10, "depth": 4},
            "train": {"precision": "fp32"},
            "zero": {"stage": stage},
            "deepspeed": {"zero_optimization": zero if stage else {}},
        }
    )


# ---- a process of a job


def rank() -> None:
    """Does what the lines that rank 0 reads say, and prints what it took, until there are no more."""
    with join_world() as world:
        engines = {stage: _engine(stage, world) for stage in PASSES}
        while (order := world.on_main(lambda: json.loads(sys.stdin.readline() or "null"))) is not None:
            if order["kind"] == "link":
                found: Any = _link_as_seen(world.size)
            elif order["kind"] == "step":
                before = _bytes_sent()
                found = _turn(engines[order["stage"]], PASSES[order["stage"]], world)
                found.append((_bytes_sent() - before) / (1 + STEPS))
            else:
                with nothing_is_sent(world.rank):
                    own = _turn(engines[order["stage"]], PASSES[order["stage"]], None)
                found = [max(each) for each in zip(*world.gather(own), strict=True)]
            if world.is_main:
                print(json.dumps(found), flush=True)
    os._exit(0)


def _engine(stage: int, world: World) -> TrainingEngine:
    config = config_of(stage)
    torch.manual_seed(0)
    model = build_vit(config.model, mean=(0.5,) * 3, std=(0.5,) * 3)
    passes = PASSES[stage]
    return build_engine(model, config, BatchSplit(IMAGES * passes * world.size, world.size, passes), world)


def _turn(engine: TrainingEngine, passes: int, world: World | None) -> list[float]:
    """Seconds of each step. world: None if nothing is sent."""
    images = torch.randint(0, 256, (IMAGES, 96, 96, 3), dtype=torch.uint8)
    labels = torch.randint(0, 10, (IMAGES,))
    engine.model.train()
    taken = []
    for _ in range(1 + STEPS):
        start = time.perf_counter()
        for _ in range(passes):
            engine.backward(torch.nn.functional.cross_entropy(engine.model(images).float(), labels))
            engine.step()
        if world is not None:
            world.sum([0.0, 0.0, 0.0])  # as the engine sums loss, gradient norm and flags
        taken.append(time.perf_counter() - start)
    return taken[1:]


def _bytes_sent() -> int:
    """By this host, since it was made."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    (counters,) = [line.split(":")[1].split() for line in lines if line.strip().startswith("eth0:")]
    return int(counters[8])


def _link_as_seen(processes: int) -> list[float]:
    """Latency in seconds, and bytes per second.

    A tiny gather waits for two latencies for each other process. A large all-reduce takes longer than a small one by
    the bytes that each process sends more.
    """
    part, whole = torch.zeros(TINY, dtype=torch.uint8), torch.zeros(TINY * processes, dtype=torch.uint8)
    tiny = _median_seconds(20, lambda: dist.all_gather_into_tensor(whole, part))
    numbers = [torch.zeros(size // 4) for size in (SMALL, LARGE)]
    small, large = (_median_seconds(3, partial(dist.all_reduce, tensor)) for tensor in numbers)
    more = 2 * (processes - 1) / processes * (LARGE - SMALL)
    return [tiny / 2 / (processes - 1), more / (large - small)]


def _median_seconds(times: int, operation: Callable[[], Any]) -> float:
    """After once that is not counted."""
    taken = []
    for _ in range(1 + times):
        start = time.perf_counter()
        operation()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


class _Arrived:
    """What an operation that is not waited for returns."""

    def wait(self, *details: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


@contextmanager
def nothing_is_sent(rank: int) -> Iterator[None]:
    """Collective operations leave sums as they are, and take the parts of others to be like their own."""

    def all_reduce(tensor: torch.Tensor, op: Any = None, group: Any = None, async_op: bool = False) -> Any:
        return _Arrived() if async_op else None

    def gather(output: torch.Tensor, own: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        for part in output.view(-1).chunk(output.numel() // own.numel()):
            if part.data_ptr() != own.data_ptr():
                part.copy_(own.view(-1))
        return _Arrived() if async_op else None

    def scatter(
        output: torch.Tensor, whole: torch.Tensor, op: Any = None, group: Any = None, async_op: bool = False
    ) -> Any:
        output.view(-1).copy_(whole.view(-1)[rank * output.numel() : (rank + 1) * output.numel()])
        return _Arrived() if async_op else None

    names = {
        "all_reduce": all_reduce,
        "all_gather_into_tensor": lambda output_tensor, input_tensor, **rest: gather(
            output_tensor, input_tensor, **rest
        ),
        "reduce_scatter_tensor": lambda output, input, **rest: scatter(output, input, **rest),
    }
    real = {name: getattr(dist, name) for name in names}
    backend = sys.modules["deepspeed.comm.comm"].cdb
    kept = backend.all_gather_function, backend.reduce_scatter_function
    try:
        for name, function in names.items():
            setattr(dist, name, function)
        backend.all_gather_function = names["all_gather_into_tensor"]
        backend.reduce_scatter_function = names["reduce_scatter_tensor"]
        yield
    finally:
        for name, function in real.items():
            setattr(dist, name, function)
        backend.all_gather_function, backend.reduce_scatter_function = kept


# ---- the jobs


class Job:
    """`processes` ranks, one on each host, which measure what they are told to."""

    def __init__(self, hosts: Hosts, processes: int, log: Path) -> None:
        self.hosts, self.processes = hosts, processes
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(processes),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": hosts.address(0),
            "MASTER_PORT": str(29500 + processes),
            "GLOO_SOCKET_IFNAME": "eth0",
        }
        command = [sys.executable, "-m", "benchmarks.plan_accuracy", "--rank"]
        self.ranks = [
            hosts.start(
                number,
                command,
                env=environment | {"RANK": str(number)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log.open("ab"),
                cwd=ROOT,
                text=True,
            )
            for number in range(processes)
        ]

    def plug(self, cable: Cable) -> None:
        time.sleep(STILL)  # what is on its way arrives: a loss would slow TCP down for the rest of the job
        for host in range(self.processes):
            delay = cable.milliseconds / 2000  # of the cables of both
            self.hosts.degrade(host, delay=delay, rate=1e6 * cable.megabytes_per_second)

    def ask(self, **order: Any) -> list[float]:
        main = self.ranks[0]
        assert main.stdin is not None and main.stdout is not None
        main.stdin.write(json.dumps(order) + "\n")
        main.stdin.flush()
        while line := main.stdout.readline():
            if line.startswith("["):
                return list(json.loads(line))
        raise SystemExit(f"a process of {self.processes} has ended: see the log")

    def close(self) -> None:
        main = self.ranks[0]
        assert main.stdin is not None
        main.stdin.close()
        for process in self.ranks:
            process.wait(60)


def _set_tcp(hosts: Hosts, host: int) -> None:
    network = ["dev", "eth0", "src", hosts.address(host), *ROUTE]
    for command in (
        ["sysctl", "-qw", *(f"{name}={value}" for name, value in TCP.items())],
        ["ip", "route", "replace", f"{hosts.network}.0/24", *network],
    ):
        done = hosts.run(host, command)
        if done.returncode != 0:
            raise SystemExit(f"a host's TCP cannot be set: {done.stderr.strip()}")


def one_round(jobs: Mapping[int, Job], number: int, results: dict[str, Any]) -> None:
    """A turn of each case, in an order that rotates."""
    turns = [*CASES, *ALONE]
    first = number * 7 % len(turns)
    for case in turns[first:] + turns[:first]:
        job = jobs[case.processes]
        job.plug(case.cable or FREE)
        if case.cable is not None:
            results["links"].setdefault(case.key, []).append(job.ask(kind="link"))
        seconds = job.ask(kind="alone" if case.cable is None else "step", stage=case.stage)
        if case.cable is not None:
            results["sent"].setdefault(case.key, []).append(seconds.pop())
        results["seconds"].setdefault(case.key, []).append(statistics.median(seconds))
        print(f"{case.key}: {statistics.median(seconds):.3f} s", flush=True)
    results["rounds"] = number + 1


# ---- predictions


def predict(case: Case, results: Mapping[str, Any]) -> StepTime:
    """From what is computed alone, and the link as it was found."""
    alone = statistics.median(results["seconds"][Case(case.stage, case.processes, None).key])
    network = Network(case.processes, 1, _interconnect(_link_of(case, results)), "gloo")
    config, passes = config_of(case.stage), PASSES[case.stage]
    return play(step_events(config, Settings.of(config, case.processes, 1, passes)), network, alone / passes)


def _link_of(case: Case, results: Mapping[str, Any]) -> Link:
    latency, bandwidth = map(statistics.median, zip(*results["links"][case.key], strict=True))
    return Link(bandwidth, latency)


def _interconnect(link: Link) -> Interconnect:
    return Interconnect(("", ""), link, link, assumed=False)


def rows_of(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for case in CASES:
        assert case.cable is not None
        predicted, measured = predict(case, results), results["seconds"][case.key]
        link, median = _link_of(case, results), statistics.median(measured)
        rows.append(
            {
                "stage": case.stage,
                "processes": case.processes,
                "cable": case.cable.title,
                "latency": link.latency,
                "bandwidth": link.bandwidth,
                "measured": median,
                "lowest": min(measured),
                "highest": max(measured),
                "predicted": predicted.total,
                "computing": predicted.computing,
                "communicating": predicted.communicating,
                "error": predicted.total / median - 1,
                "predicted_bytes": predicted.sent_bytes,
                "sent_bytes": statistics.median(results["sent"][case.key]),
            }
        )
    return rows


def render(results: Mapping[str, Any]) -> str:
    environment, rows = results["environment"], rows_of(results)
    worst = max(rows, key=lambda row: abs(row["error"]))
    within = sum(abs(row["error"]) <= ALLOWED for row in rows)
    cores, load = environment["cpu_count"], environment["load_average"][0]
    lines = [
        "# Predicted and measured step times",
        "",
        f"`{environment['command']}`, {environment['started']}: {environment['cpu']}, {cores} cores, load average "
        f"{load:.2f} at the start; PyTorch {environment['versions']['torch']}, DeepSpeed "
        f"{environment['versions']['deepspeed']}.",
        "",
        f"A ViT of {results['parameters']:,} parameters in fp32, {IMAGES} images per process and pass, one thread "
        f"each, over Gloo. Medians of {results['rounds']} rounds, with the lowest and the highest; a round's figure is "
        f"the median of {STEPS} steps. Computed: as many processes side by side that send nothing. The rest of a "
        "prediction follows from latency and bandwidth as the processes found them before each turn, by a tiny gather "
        "and two all-reduces: a process plays the cable, and takes some time of its own. Nothing is fitted.",
        "",
        f"{within} of {len(rows)} predictions are within {100 * ALLOWED:.0f} %; the worst is "
        f"{100 * worst['error']:+.0f} %.",
        "",
        "Sent: by each process in a step, with the headers of TCP, beside what the prediction counts.",
        "",
        "| ZeRO | processes | cable | as found | computed, s | communication, s | predicted, s | measured, s | error "
        "| sent, MB |",
        "|---:|---:|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        figures = [f"{row[key]:.3f}" for key in ("computing", "communicating", "predicted", "measured")]
        figures[-1] += f" ({row['lowest']:.3f} to {row['highest']:.3f})"
        sent = f"{row['sent_bytes'] / 1e6:.2f} ({row['predicted_bytes'] / 1e6:.2f})"
        found = f"{row['bandwidth'] / 1e6:.1f} MB/s, {1e3 * row['latency']:.2f} ms"
        cells = [row["stage"], row["processes"], row["cable"], found, *figures, f"{100 * row['error']:+.1f} %", sent]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cpu")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.rank:
        rank()
        return
    if reason := missing():
        raise SystemExit(reason)
    args.out.mkdir(parents=True, exist_ok=True)
    place = args.out / f"{NAME}.json"
    results: dict[str, Any] = {
        "environment": describe_machine(shlex.join(["python", "-m", f"benchmarks.{NAME}", *sys.argv[1:]])),
        "parameters": parameter_count(config_of(0).model),
        "rounds": 0,
        "links": {},
        "seconds": {},
        "sent": {},
    }
    if place.exists():
        results = json.loads(place.read_text())
    log = Path(tempfile.mkdtemp(prefix=f"{NAME}-")) / "log"
    print(f"the processes write to {log}", flush=True)
    with Hosts(3) as hosts:
        for host in range(3):
            _set_tcp(hosts, host)
        jobs = {processes: Job(hosts, processes, log) for processes in (2, 3)}
        for job in jobs.values():  # DeepSpeed learns the order of the modules, and TCP's windows open
            for stage in PASSES:
                job.ask(kind="step", stage=stage)
        for number in range(results["rounds"], args.rounds):
            one_round(jobs, number, results)
            atomic_write(place, json.dumps({**results, "rows": rows_of(results)}, indent=1) + "\n")
            atomic_write(args.out / f"{NAME}.md", render(results))
        for job in jobs.values():
            job.close()
    print(render(results))


if __name__ == "__main__":
    main()
