"""torchrun's agent and the exit codes of its processes."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastvit_engine.checkpoint.in_memory import can_hold, held_copies
from tests.in_full import in_full

REPOSITORY = Path(__file__).parents[2]
# A rank that notes that it was started, waits for the other, and ends as it is told: with a code, or with 76 when it
# gets SIGTERM.
RANK = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: os._exit(76))
rank, attempt = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
notes = pathlib.Path(sys.argv[1])
with open(notes / f"{rank}-{attempt}", "x") as file: file.write(os.environ["FASTVIT_RUN_ID"])
while not (notes / f"{1 - rank}-{attempt}").exists():
    time.sleep(0.01)
told = sys.argv[2 + rank]
if told == "wait":
    time.sleep(600)
sys.exit(int(told))
"""


@pytest.fixture
def agent(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "started").mkdir()

    def start(*told, nodes="1"):
        options = ["--nnodes", nodes, "--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "0.05"]
        options += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
        options += ["--rdzv-conf", "is_host=true,last_call_timeout=1"]
        command = [sys.executable, REPOSITORY / "launch/torchrun/agent.py", *options]
        path = f"{REPOSITORY}:{REPOSITORY}/kernels"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        command += [tmp_path / "rank.py", tmp_path / "started", *told]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    return start


def started(folder):
    return sorted(path.name for path in (folder / "started").iterdir())


@pytest.mark.parametrize(
    ("told", "other", "nodes", "restarts"),
    [
        in_full("2", "2", "1", 0),
        ("76", "76", "1", 0),
        in_full("75", "75", "1", 1),
        ("76", "76", "1:2", 1),
        in_full("2", "wait", "1", 0),
        ("75", "wait", "1", 1),  # the agent ends the other one, which says 76: that is no request to leave
    ],
)
def test_only_what_a_restart_may_cure_is_started_again(agent, tmp_path, told, other, nodes, restarts):
    running = agent(told, other, nodes=nodes)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == int(told), errors
    assert started(tmp_path)[-1].endswith(f"-{restarts}")
    if told == "2":  # no rank of this node has said why
        assert errors == "launch: ended because of bad input: another node says which\n"
    else:
        assert f"processes of this node ended with [{told}]" in errors
        assert "(exitcode: 76)" not in errors and ("(exitcode: 75)" in errors) == (told == "75")
    (run_id,) = {path.read_text() for path in (tmp_path / "started").iterdir()}  # of all ranks, also after a restart
    assert len(run_id) == 32


def test_of_bad_input_there_is_one_line(agent, tmp_path):
    program = (tmp_path / "rank.py").read_text()
    says = """
if rank == 1:
    open(os.environ["FASTVIT_ERROR_SHOWN"], "x")
    print("fastvit: error: a sentence", file=sys.stderr, flush=True)
sys.exit"""
    (tmp_path / "rank.py").write_text(program.replace("\nsys.exit", says))
    running = agent("2", "2")
    _, errors = running.communicate(timeout=120)
    assert (running.returncode, errors) == (2, "fastvit: error: a sentence\n")
    assert started(tmp_path) == ["0-0", "1-0"]  # and it is not tried again


def test_told_to_leave_it_tells_its_processes_and_reports_that_they_saved(agent, tmp_path):
    running = agent("wait", "wait")
    deadline = time.monotonic() + 120
    while len(started(tmp_path)) < 2 and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 76, errors
    assert "stopped on request by SIGTERM; processes ended with [76]" in errors


# ---- copies of the state, which its processes make


class Meeting:
    """A store of which nobody else knows."""

    def compare_set(self, key, expected, wanted):
        return wanted.encode()


@pytest.fixture
def restart(monkeypatch, tmp_path):
    """restart(): the agent starts its processes again. Also the memory that it holds for their copies."""
    if not can_hold():
        pytest.skip("needs Linux's memfd_create")
    spec = importlib.util.spec_from_file_location("agent", REPOSITORY / "launch/torchrun/agent.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.LocalElasticAgent, "_start_workers", lambda *_: {})
    monkeypatch.setattr(module.os, "environ", dict(os.environ))
    with held_copies(2, guests=True) as holder:
        agent = module.Agent.__new__(module.Agent)
        agent.folder, agent.holder = str(tmp_path), holder
        yield lambda: agent._start_workers(SimpleNamespace(store=Meeting())), holder


def copy(areas, sequence):
    for area in areas:
        slot = area.begin(7, 2)
        os.pwrite(area.descriptor, b"weights", slot.start)
        area.commit(slot, sequence, sequence, b"{}")


def test_copies_outlive_a_restart_and_are_dropped_when_training_ends_twice_where_they_end(restart):
    start, holder = restart
    start()
    for sequence in (1, 2):  # training makes progress, and fails
        copy([*holder.areas, *holder.guests], sequence)
        start()
        assert holder.newest_step == sequence and holder.guests[0].copies()
    start()  # no progress since
    assert holder.newest_step is None and not holder.guests[0].copies()
    start()
    copy(holder.areas, 1)
    start()
    assert holder.newest_step == 1
