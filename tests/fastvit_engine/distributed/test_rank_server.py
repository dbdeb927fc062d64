"""The process that forks ranks."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from fastvit_engine.distributed.rank_server import CannotFork, RankServer, why_not_fork

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="relies on Linux")

# In place of the engine's command: says who it is, and does as it is told.
CLI = """
import os, pathlib, signal, sys, time
def main():
    rank, what = os.environ["RANK"], sys.argv[1]
    name = pathlib.Path("/proc/self/comm").read_text().strip()
    pathlib.Path(f"rank{rank}").write_text(f"{name}|{os.getppid()}|{os.environ['SHARED']}|{signal.getsignal(signal.SIGTERM)!r}")
    if what == "wait":
        time.sleep(60)
    return int(what)
"""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """server(*modules): one whose ranks run CLI, in a folder of their own."""
    (tmp_path / "stand_in.py").write_text(
        f"import sys, types\ncli = types.ModuleType('fastvit_engine.cli')\nexec({CLI!r}, vars(cli))\n"
        "sys.modules['fastvit_engine.cli'] = cli\n"
    )
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=[60], daemon=True).start()\n"
    )
    (tmp_path / "broken.py").write_text("raise SystemExit('broken')\n")
    monkeypatch.chdir(tmp_path)
    made = []

    def start(*modules, descriptors=()):
        paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "SHARED": "by all"}
        made.append(RankServer(["stand_in", *modules], environment, descriptors))
        return made[-1]

    yield start
    for each in made:
        each.close()


def is_alive(rank):
    try:
        return Path(f"/proc/{rank.pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ranks_are_named_keep_the_environment_and_give_their_exit_codes(server, tmp_path):
    forks = server()
    ranks = [forks.fork([str(code)], {"RANK": str(rank)}) for rank, code in enumerate([0, 75])]
    assert [rank.wait(30) for rank in ranks] == [0, 75]
    for rank in range(2):
        name, parent, shared, handler = (tmp_path / f"rank{rank}").read_text().split("|")
        assert (name, shared) == (f"fastvit rank {rank}", "by all")
        assert int(parent) not in (os.getpid(), 1)
        assert "SIG_DFL" in handler  # although the server ignores what is meant for ranks


def test_a_signal_that_ends_a_rank_is_told(server, tmp_path):
    rank = server().fork(["wait"], {"RANK": "0"})
    assert rank.poll() is None
    os.kill(rank.pid, signal.SIGKILL)
    assert rank.wait(30) == -signal.SIGKILL == rank.poll()
    rank.send_signal(signal.SIGTERM)  # to nobody


def test_signals_to_the_group_reach_ranks_and_not_the_server(server):
    forks = server()
    os.kill(forks._process.pid, signal.SIGTERM)
    os.kill(forks._process.pid, signal.SIGINT)
    rank = forks.fork(["wait"], {"RANK": "0"})
    rank.send_signal(signal.SIGTERM)
    assert rank.wait(30) == -signal.SIGTERM


def test_ranks_end_with_their_server_and_the_launcher_hears_of_it(server):
    forks = server()
    ranks = [forks.fork(["wait"], {"RANK": str(rank)}) for rank in range(2)]
    os.kill(forks._process.pid, signal.SIGKILL)
    assert [rank.wait(30) for rank in ranks] == [-signal.SIGKILL] * 2
    deadline = time.monotonic() + 30
    while any(map(is_alive, ranks)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_alive, ranks))
    with pytest.raises(CannotFork):
        forks.fork(["0"], {"RANK": "0"})


def test_ranks_inherit_descriptors_under_their_numbers(server):
    shared = os.memfd_create("shared")
    server(descriptors=[shared]).fork(["0"], {"RANK": "0"}).wait(30)
    os.close(shared)


def test_a_server_that_imports_threads_refuses_to_fork(server):
    with pytest.raises(CannotFork, match="has started 1 more thread"):
        server("threaded")


def test_a_server_that_cannot_import_is_said_not_to_start(server):
    with pytest.raises(CannotFork, match="does not start"):
        server("broken")


def test_what_the_engine_imports_can_be_forked():
    threads = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"}
    RankServer(["fastvit_engine.train.preloaded"], {**os.environ, **threads}).close()


def test_an_open_gpu_and_threads_are_reasons_not_to_fork(tmp_path):
    (tmp_path / "task" / "1").mkdir(parents=True)
    (tmp_path / "fd").mkdir()
    (tmp_path / "fd" / "0").symlink_to("/dev/null")
    assert why_not_fork(tmp_path) is None
    (tmp_path / "fd" / "7").symlink_to("/dev/nvidiactl")
    assert "has opened /dev/nvidiactl" in why_not_fork(tmp_path)
    (tmp_path / "task" / "2").mkdir()
    assert "1 more thread" in why_not_fork(tmp_path)
