"""Limits of hosts and containers: cores, memory, shared memory, open files, names and ports."""

import resource
import socket
import subprocess

import pytest

from fastvit_engine.control_groups import MemoryLimit
from fastvit_engine.doctor import host
from fastvit_engine.doctor.findings import Status
from fastvit_engine.doctor.isolated import run_isolated


def test_fewer_cores_than_the_machine_has_are_a_note(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    cores, workers = host._check_cores(4.0, processes=8, workers=4)
    assert (cores.status, cores.found.partition(":")[0]) == (Status.NOTE, "this process may use 4 of 64")
    assert workers.found == "8 processes with 4 data workers each share 4 cores"


def test_memory_counts_what_the_container_may_use():
    finding = host._check_memory(MemoryLimit(3 * 2**30, 2**31), processes=1)
    assert finding.status == Status.WARNING
    assert finding.found.startswith("1.0 GiB of 3.0 GiB that the container or job may use free: 1 process with")


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "shm"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_shared_memory_that_is_too_small(small_disk):
    finding = host.check_shared_memory(small_disk, gpus=0)
    assert (finding.status, finding.found) == (
        Status.WARNING,
        f"64.0 KiB of 64.0 KiB free in {small_disk}: data workers need some",
    )
    assert "NCCL needs it between 8 GPUs" in host.check_shared_memory(small_disk, gpus=8).found


def test_no_shared_memory_at_all(tmp_path):
    finding = host.check_shared_memory(tmp_path / "none", gpus=0)
    assert finding.status == Status.PROBLEM
    assert finding.found.startswith(f"there is no {tmp_path}/none: data workers cannot start")


@pytest.mark.parametrize(
    ("soft", "hard", "status", "words"),
    [(40, 400, "warning", "ulimit -n 400"), (40, 40, "warning", "the hard limit is 40 too"), (4096, 4096, "ok", "")],
)
def test_few_open_files(soft, hard, status, words):
    def check(send):
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        send(host._check_open_files().to_dict())

    (finding,) = run_isolated(check, 20).messages
    assert finding["status"] == status
    assert words in finding["advice"]
    assert status == "ok" or finding["found"].startswith("a process may open 40: only 20 shards stay open")


@pytest.mark.parametrize(
    ("address", "environment", "status", "words"),
    [
        ("127.0.1.1", {}, Status.NOTE, "resolves to 127.0.1.1, where no other host finds it"),
        (None, {}, Status.NOTE, "does not resolve"),
        ("127.0.1.1", {"GLOO_SOCKET_IFNAME": "eth0"}, Status.OK, "GLOO_SOCKET_IFNAME=eth0 is used"),
        ("10.0.0.7", {}, Status.OK, "node-7 is 10.0.0.7"),
    ],
)
def test_the_name_of_the_host(monkeypatch, address, environment, status, words):
    def resolve(name, *rest, **options):
        if address is None:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]

    monkeypatch.setattr(socket, "gethostname", lambda: "node-7")
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    finding = host._check_name(environment)
    assert finding.status == status
    assert words in finding.found


def test_a_port_that_another_run_has_taken(monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(host, "_PORTS", (port,))
        (finding,) = host._check_ports({})
        assert (finding.status, finding.found) == (Status.NOTE, f"{port} taken, perhaps by another run")
        assert list(host._check_ports({"MASTER_PORT": str(port)})) == []
    (finding,) = host._check_ports({})
    assert finding.status == Status.OK


def test_infiniband_with_a_small_limit_of_locked_memory(monkeypatch):
    monkeypatch.setattr(host.Path, "glob", lambda self, pattern: [host.Path("mlx5_0")])
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (65536, 65536))
    (finding,) = host._check_pinning()
    assert finding.found == "a process may lock 64.0 KiB: NCCL cannot use InfiniBand (mlx5_0)"
