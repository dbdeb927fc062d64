"""Measures the loader on shards in an object store against the same shards on a local disk.

    python -m benchmarks.remote_reads SHARDS [--workers 2] [--rounds 7] [--images 640] [--out DIR]

In each round, the loader takes its turns in an order that rotates: from the local disk, from a server on loopback
that speaks S3, and from one that answers each request 20 ms later. There is no cache folder, so each sample is a
request or a part of one. CPU time is that of this process and its data workers; the server's is not counted, but it
shares the processors.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.data_loading.variants import VARIANTS, Dataset, open_dataset
from benchmarks.machine import ROOT, commit
from benchmarks.step_overhead import describe_machine
from fastvit_engine.data.check.speed import LoaderTime, link_shards, naming_linked_shards, time_loader
from fastvit_engine.data.shards.index import write_index
from fastvit_engine.files import atomic_write

LATENCY_S = 0.02
PREFETCHED = 4  # batches that are not timed
TITLES = {
    "local": "local disk",
    "s3": "S3 on loopback",
    "s3 late": f"S3 on loopback, {LATENCY_S * 1000:.0f} ms later",
}
_OURS = next(variant for variant in VARIANTS if variant.name == "fastvit")


@contextmanager
def serving(folder: Path, latency: float) -> Iterator[str]:
    """The endpoint of a server in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.data_loading.s3_server", str(folder), "--latency", str(latency)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None  # a pipe
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


def measure(
    pattern: str, *, workers: int, rounds: int, images: int, image_size: int, batch_size: int
) -> dict[str, list[LoaderTime]]:
    """What each kind of storage took, a measurement per round."""
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}
    os.environ.update(keys)
    taken: dict[str, list[LoaderTime]] = {name: [] for name in TITLES}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        link_shards(pattern, scratch / "local")
        stack.enter_context(naming_linked_shards(scratch / "local"))
        shards = sorted(path.name for path in (scratch / "local").glob("*.tar"))
        urls = [f"s3://bucket/{name}" for name in shards]
        (scratch / "list.txt").write_text("".join(f"{url}\n" for url in urls))
        endpoints = {
            name: stack.enter_context(serving(scratch / "local", latency))
            for name, latency in (("s3", 0.0), ("s3 late", LATENCY_S))
        }
        os.environ["AWS_ENDPOINT_URL"] = endpoints["s3"]
        write_index(urls, scratch / "s3.index")
        datasets: dict[str, Dataset] = {}
        for name in TITLES:
            os.environ["AWS_ENDPOINT_URL"] = endpoints.get(name, "")
            local = name == "local"
            where = str(scratch / "local") if local else f"@{scratch}/list.txt"
            index = None if local else scratch / "s3.index"
            datasets[name] = open_dataset(name, where, image_size, batch_size, scratch, index=index)
        for number in range(rounds):
            order = list(TITLES)[number % len(TITLES) :] + list(TITLES)[: number % len(TITLES)]
            for name in order:
                os.environ["AWS_ENDPOINT_URL"] = endpoints.get(name, "")  # which data workers read when they start
                batches = _OURS.batches(datasets[name], workers, True)
                taken[name].append(time_loader(batches, images, prefetched=PREFETCHED))
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return taken


def ratios(taken: Mapping[str, Sequence[LoaderTime]], name: str, clock: str) -> list[float]:
    """Images per second of `clock` ("cpu" or "wall") over those from the local disk, in each round."""
    pairs = zip(taken[name], taken["local"], strict=True)
    return [(one.images / getattr(one, clock)) / (local.images / getattr(local, clock)) for one, local in pairs]


def report(record: Mapping[str, Any], taken: Mapping[str, Sequence[LoaderTime]]) -> str:
    """The table in Markdown."""
    shared = "Other work ran on the machine, so figures vary more than they should. "
    lines = [
        "# The loader on shards in an object store",
        "",
        f"`{record['command']}`, {record['started']}: {record['environment']['cpu']}; load average "
        f"{record['load_average'][0]:.2f} at the start and {record['load_average'][1]:.2f} at the end. "
        f"{record['workers']} data workers, images of {record['image_size']} pixels, {record['rounds']} rounds of "
        f"{record['images']} images in turns. The server speaks S3 on the same machine; its CPU time is not counted, "
        "but it takes processor time from the loader. No cache folder. Medians, and ratios to the local disk round by "
        f"round with their range. {shared if record['load_average'][0] > 1 else ''}",
        "",
        "| shards on | images per CPU-second | ratio | images per second | ratio |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, title in TITLES.items():
        cells = []
        for clock in ("cpu", "wall"):
            cells.append(f"{median(one.images / getattr(one, clock) for one in taken[name]):,.0f}")
            found = ratios(taken, name, clock)
            cells.append("" if name == "local" else f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f})")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += [
        "",
        "Targets: 0.8 of the images per CPU-second without latency: "
        f"{_verdict(median(ratios(taken, 's3', 'cpu')), 0.8)}. Half of the images per second with 20 ms of latency: "
        f"{_verdict(median(ratios(taken, 's3 late', 'wall')), 0.5)}.",
    ]
    return "\n".join(lines) + "\n"


def _verdict(found: float, target: float) -> str:
    return f"{found:.2f}, {'reached' if found >= target else 'missed'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="a folder or pattern of local shards")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=640, help="of each measurement, at least")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=None, help="folder for remote_reads.md and .json")
    given = parser.parse_args()
    command = shlex.join(["python", "-m", "benchmarks.remote_reads", "SHARDS", *sys.argv[2:]])
    environment = describe_machine(command)
    environment.pop("hostname", None)
    before = os.getloadavg()[0]
    started = datetime.now(UTC).isoformat(timespec="seconds")
    taken = measure(
        given.shards,
        workers=given.workers,
        rounds=given.rounds,
        images=given.images,
        image_size=given.image_size,
        batch_size=given.batch_size,
    )
    record = {
        "command": command,
        "started": started,
        "commit": commit(),
        "environment": environment,
        "load_average": [before, os.getloadavg()[0]],
        "workers": given.workers,
        "rounds": given.rounds,
        "images": given.images,
        "image_size": given.image_size,
        "batch_size": given.batch_size,
        "latency_s": LATENCY_S,
        "taken": {name: [one._asdict() for one in each] for name, each in taken.items()},
    }
    text = report(record, taken)
    print(text)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        atomic_write(given.out / "remote_reads.md", text)
        atomic_write(given.out / "remote_reads.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
