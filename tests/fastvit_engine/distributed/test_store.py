"""A job on one machine listens where no other machine can reach it."""

import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from fastvit_engine.distributed import supervise
from fastvit_engine.distributed.store import JobStore, is_loopback
from tests.fastvit_engine.distributed.listening import is_reachable_from_elsewhere, listening_addresses
from tests.fastvit_engine.warm_rank import run_program
from tests.fastvit_engine.warm_ranks import exit_codes_of
from tests.in_full import in_full

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
ROOT = Path(__file__).parents[3]

# Joins as `fastvit train` does, and prints the addresses that it and its parent listen on.
JOIN = """
import os
import torch.distributed as dist
from fastvit_engine.distributed.world import join_world
from tests.fastvit_engine.distributed.listening import listening_addresses
with join_world() as world:
    dist.new_group(backend="gloo")
    assert world.sum([1]).item() == world.size
    found = ["own", *listening_addresses(os.getpid()), "parent", *listening_addresses(os.getppid())]
    os.write(1, (" ".join(found) + "\\n").encode())  # in one piece
"""


@pytest.fixture
def environment() -> dict[str, str]:
    path = f"{ROOT}:{ROOT}/kernels"
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return kept | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def own_address() -> str:
    """An address of this machine that others could reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # chooses a route; nothing is sent
        except OSError:
            pytest.skip("this machine has no network")
        return str(probe.getsockname()[0])


def addresses(printed: str) -> list[str]:
    """All that a rank has printed; there are some of its own or of its parent's."""
    found = [word for word in printed.split() if word not in ("own", "parent")]
    assert found, printed
    return found


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_store_on_loopback_is_reached_from_here_only(host):
    store = JobStore(host, is_master=True, wait_for_workers=False)
    client = dist.TCPStore(host, store.port)
    client.set("key", "value")
    assert store.get("key") == b"value"
    with pytest.raises(OSError):
        socket.create_connection((own_address(), store.port), timeout=5)
    assert not any(map(is_reachable_from_elsewhere, listening_addresses(os.getpid())))


def test_a_store_for_several_machines_is_reached_from_all():
    store = JobStore(own_address(), is_master=True, wait_for_workers=False)
    socket.create_connection((own_address(), store.port), timeout=5).close()


def test_which_hosts_are_loopback():
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("192.0.2.1") and not is_loopback("no such host")


@pytest.mark.distributed
def test_the_launcher_and_its_ranks(environment):
    with supervise.start_ranks(
        [sys.executable, "-c", JOIN], 2, environment, stdout=subprocess.PIPE, text=True
    ) as ranks:
        printed = [rank.communicate(timeout=120)[0] for rank in ranks]
    for text in printed:
        assert not any(map(is_reachable_from_elsewhere, addresses(text))), text


@pytest.mark.distributed
def test_ranks_that_nobody_serves(tmp_path):
    """As `fastvit_engine.train` starts one, or as a user does by hand."""
    port, log = supervise.free_port(), tmp_path / "log"

    def alone(rank):
        return supervise.rank_environment(rank, 2, port, {}) | {"TORCHELASTIC_USE_AGENT_STORE": "False"}

    assert exit_codes_of([], 2, log, alone, before=partial(run_program, JOIN)) == [0, 0], log.read_text()
    lines = [line for line in log.read_text().splitlines() if line.startswith("own")]
    assert len(lines) == 2
    for line in lines:
        own = line.partition("parent")[0]  # the parent is what forks them
        assert not any(map(is_reachable_from_elsewhere, addresses(own))), line


@pytest.mark.distributed
@pytest.mark.parametrize("shared", [in_full("0"), "1"])  # as PyTorch does by itself; as our launchers ask for
def test_torchrun_on_one_machine(environment, tmp_path, shared):
    (tmp_path / "rank.py").write_text(JOIN)
    options = ["--nnodes", "1", "--nproc-per-node", "2", "--max-restarts", "0"]
    options += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    options += ["--rdzv-conf", "is_host=true,last_call_timeout=1"]
    done = subprocess.run(
        [sys.executable, ROOT / "launch/torchrun/agent.py", *options, tmp_path / "rank.py"],
        env=environment | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": shared, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("own")]
    assert len(lines) == 2
    for line in lines:
        assert not any(map(is_reachable_from_elsewhere, addresses(line))), line
