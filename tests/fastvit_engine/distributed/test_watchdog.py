"""The watchdog in two small processes that train nothing: one stops, dies or lags, in the middle of a collective."""

import os
import signal
import sys
import time
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import torch

from fastvit_engine.config import WatchdogConfig
from fastvit_engine.distributed import watchdog as module
from fastvit_engine.distributed.stacks import collect_stacks
from fastvit_engine.distributed.supervise import free_port, rank_environment
from fastvit_engine.distributed.watchdog import Watchdog
from fastvit_engine.distributed.world import World, join_world
from fastvit_engine.errors import RestartError, UserError
from fastvit_engine.observe.events import read_events
from fastvit_engine.observe.run_folder import RunFolder

pytestmark = pytest.mark.distributed


class Rank:
    """A forked process that is a rank: forking spares it the seconds of importing PyTorch."""

    def __init__(self, rank, port, run, train):
        self.errors_file = run.path / f"errors{rank}"
        self.process = get_context("fork").Process(target=self._main, args=[rank, port, run, train])
        self.process.start()

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def end(self, seconds=60):
        """(exit code, standard error) once it has ended."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "it does not end"
        return self.process.exitcode, self.errors_file.read_text()

    def _main(self, rank, port, run, train):
        os.environ.update(rank_environment(rank, 2, port), CUDA_VISIBLE_DEVICES="")
        os.dup2(os.open(self.errors_file, os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        code = 0
        try:
            limits = WatchdogConfig(timeout_seconds=4, slow_phase_seconds=50)
            with join_world(60) as world, Watchdog(run, world, limits) as watchdog:
                watchdog.begin(7)
                watchdog.phase("waiting for data")
                watchdog.step_done(8)
                watchdog.phase("waiting for data")
                (run.path / f"ready{rank}").touch()
                train(world, watchdog)
        except (RestartError, UserError) as error:
            print(f"fastvit: error: {error}", file=sys.stderr, flush=True)
            code = error.exit_code
        os._exit(code)


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path)


@pytest.fixture
def start(run):
    """Starts two ranks that `train(world, watchdog)`, and waits until they get there. Rank 0 holds the store."""
    ranks = []

    def begin(train):
        port = free_port()
        ranks.extend(Rank(rank, port, run, train) for rank in range(2))
        deadline = time.monotonic() + 60
        while not all((run.path / f"ready{rank}").exists() for rank in range(2)):
            assert time.monotonic() < deadline, [rank.errors_file.read_text() for rank in ranks]
            time.sleep(0.02)
        return ranks

    yield begin
    for rank in ranks:
        rank.process.kill()
        rank.process.join()


def exchange_for_ever(world, watchdog):
    watchdog.phase("backward")
    while True:
        world.barrier()


def test_a_late_rank_is_named_and_all_leave_with_their_stack_traces(start, run):
    def train(world, watchdog):
        if world.rank == 1:
            time.sleep(600)
        exchange_for_ever(world, watchdog)

    ranks = start(train)
    began = time.monotonic()
    (code, errors), (other_code, other_errors) = (rank.end() for rank in ranks)
    assert 3 < time.monotonic() - began < 40  # not the time of slow phases
    assert (code, other_code) == (75, 75)
    assert "rank 1 on " in errors
    assert "is late, in 'waiting for data' after step 8 for" in errors
    assert "while rank 0 on" in errors
    assert other_errors == ""  # one process speaks
    (event,) = read_events(run)
    assert (event["event"], event["rank"], event["ranks"], event["step"]) == ("hang", 0, [1], 8)
    late, waiting = (next(run.stacks.glob(f"*-rank-{rank}.txt")).read_text() for rank in (1, 0))
    assert late.startswith("rank 1 on ")
    assert "in 'waiting for data' after step 8" in late
    assert "test_watchdog.py" in late
    assert "in barrier" in waiting
    assert len(list(run.stacks.glob("*-collectives-*"))) == 2


def test_the_holder_of_the_store_may_be_the_one_that_stops(start, run):
    stopped, other = start(exchange_for_ever)
    stopped.send_signal(signal.SIGSTOP)
    code, errors = other.end()
    assert code == 75
    assert "the job's store, which rank 0 or its launcher holds, has not answered for" in errors
    assert read_events(run)[0]["event"] == "hang"
    assert "in barrier" in next(run.stacks.glob("*-rank-1.txt")).read_text()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_other_with_one_sentence(start, run, victim):
    ranks = start(exchange_for_ever)
    time.sleep(2)  # for the heartbeats to come to where the ranks are
    ranks[victim].send_signal(signal.SIGKILL)
    code, errors = ranks[1 - victim].end()
    assert code == 75
    assert errors.count("fastvit: error:") == 1
    assert "Traceback" not in errors
    if victim == 0:  # the holder of the store
        assert "the job's store is gone, so rank 0 or its launcher has ended" in errors
    else:
        assert "rank 1 on " in errors
        assert "is gone, last heard of in 'backward' after step 8: " in errors
    (event,) = read_events(run)
    assert (event["event"], event["ranks"]) == ("failure", [victim] * victim)


def test_a_rank_that_fails_is_quoted_by_the_others(start, run):
    def train(world, watchdog):
        if world.rank == 1:
            raise UserError("shard 7 has burnt: restore it")
        exchange_for_ever(world, watchdog)

    (code, errors), (other_code, other_errors) = (rank.end() for rank in start(train))
    assert (code, other_code) == (75, 2)
    assert other_errors == "fastvit: error: shard 7 has burnt: restore it\n"
    assert "rank 1 on " in errors
    assert "has failed: shard 7 has burnt" in errors
    assert [event["ranks"] for event in read_events(run)] == [[1]]


def test_slow_phases_and_marks_of_any_rank_are_given_their_time(start, run):
    def train(world, watchdog):  # 4 s are allowed
        watchdog.phase("saving", slow=True)
        time.sleep(6 * world.rank)
        world.barrier()
        for _ in watchdog.marked(range(12), "evaluating"):
            time.sleep(0.5 * world.rank)
        world.barrier()

    results = [rank.end() for rank in start(train)]
    assert [code for code, _ in results] == [0, 0], results
    assert read_events(run) == []


def test_stack_traces_on_request_come_from_all_ranks(start, run):
    def train(world, watchdog):
        for _ in watchdog.marked(range(600), "evaluating"):
            time.sleep(0.1)

    start(train)
    files = collect_stacks(run, 2, seconds=30)
    assert [file.name.partition("-rank-")[2] for file in files] == ["0.txt", "1.txt"]
    assert all("in 'evaluating' after step 8" in file.read_text() for file in files)
    assert not (run.stacks / "request").exists()
    assert collect_stacks(run, 2, seconds=0) == []
    assert read_events(run) == []


class MemoryStore:
    """The job's key-value store, within this process."""

    def __init__(self):
        self.values = {}

    def set(self, key, value):
        self.values[key] = value.encode()

    def get(self, key):
        return self.values.get(key, b"")

    def multi_get(self, keys):
        return [self.get(key) for key in keys]

    def compare_set(self, key, expected, value):
        if self.get(key) == expected.encode():
            self.set(key, value)
        return self.get(key)


@pytest.mark.parametrize(("slow", "bound"), [(False, 4.0), (True, 50.0)])
def test_a_hang_is_one_as_soon_as_nothing_has_happened_for_the_time_that_is_configured(run, monkeypatch, slow, bound):
    clock, left = [100.0], []
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setenv("LOCAL_RANK", "0")
    world = World(0, 1, torch.device("cpu"))
    watchdog = Watchdog(run, world, WatchdogConfig(timeout_seconds=4, slow_phase_seconds=50))
    watchdog._store, watchdog._heard = MemoryStore(), [100.0]
    monkeypatch.setattr(watchdog, "_leave_together", lambda **hang: left.append(hang))

    def exchange(at):
        clock[0] = at
        watchdog._exchange()

    watchdog.begin(7)
    watchdog.step_done(8)
    for began in (101.0, 200.0):  # the second is progress
        watchdog.phase("backward", slow=slow)
        exchange(began)
        exchange(began + bound - 0.1)
        assert not left
    exchange(200.0 + bound + 0.1)
    assert len(left) == 1
