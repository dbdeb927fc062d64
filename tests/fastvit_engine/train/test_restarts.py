"""Ranks that are killed continue from copies in memory: the record is the one of a run that nothing happened to."""

import json
import os
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest

from benchmarks.faults import ranks_of
from fastvit_engine.checkpoint.in_memory import can_hold
from fastvit_engine.config import Config
from fastvit_engine.errors import UserError
from fastvit_engine.observe.metrics import read_metrics
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.sizing import copies
from fastvit_engine.train import restarts as restarts_module
from fastvit_engine.train.restarts import check_room, restarts
from tests.fastvit_engine.warm_ranks import exit_codes_of
from tests.in_full import in_full

pytestmark = [pytest.mark.skipif(not can_hold(), reason="needs Linux's memfd_create")]

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SHARD_EVERYTHING = "deepspeed.zero_optimization={stage3_param_persistence_threshold: 0, reduce_bucket_size: 5000}"
# What has a state of its own: random numbers, an average of the weights, a decaying rate.
SETTINGS = ["train.precision=fp32", "model.dropout=0.1", "ema.decay=0.9", "data.num_workers=1"]


def record(folder):
    rows, _ = read_metrics(folder / "metrics.jsonl")
    keys = ("step", "samples", "loss", "grad_norm", "lr", "samples_hash", "flops")
    return [tuple(row[key] for key in keys) for row in rows]


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def steps_done(run):
    return run.metrics.read_text().count("samples_hash") if run.metrics.exists() else 0


def events(run, kind):
    lines = run.events.read_text().splitlines() if run.events.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]


class Launched:
    """`fastvit train` in a process group of its own."""

    def __init__(self, command, run, log):
        self.run, self.log = run, log
        with open(log, "a") as file:
            self.process = subprocess.Popen(command, env=ENVIRONMENT, stdout=file, stderr=file, start_new_session=True)

    def wait_for(self, condition, seconds=150):
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the run ended before its time\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"the run never got there\n{self.log.read_text()}"
            time.sleep(0.005)

    def kill_rank(self, rank, at):
        """Once so many steps are done. Returns how many were."""
        self.wait_for(lambda: steps_done(self.run) >= at)
        done = steps_done(self.run)
        os.kill(ranks_of(self.process.pid)[rank], signal.SIGKILL)
        return done

    def end(self, seconds=150):
        assert self.process.wait(seconds) == 0, self.log.read_text()


@pytest.fixture
def launch(train_command, tmp_path):
    """launch(*settings): a run on two processes, in the folder "run"."""
    started = []

    def begin(*settings, resume="never"):
        run = RunFolder(tmp_path / "run")
        command = train_command(run.path, *SETTINGS, *settings, processes=2, resume=resume, max_restarts=2)
        started.append(Launched(command, run, tmp_path / "log"))
        return started[-1]

    yield begin
    for each in started:
        if each.process.poll() is None:
            os.killpg(each.process.pid, signal.SIGKILL)
        each.process.wait()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 3, in_full(0), in_full(2)])
def test_a_killed_rank_costs_a_step_and_changes_nothing(launch, train, stage, tmp_path):
    settings = [f"zero.stage={stage}", "train.duration=30 steps", *([SHARD_EVERYTHING] if stage == 3 else [])]
    started = launch(*settings, "checkpoint.every=10 steps")
    for kill, (rank, at) in enumerate([(1, 8), (0, 18)]):
        done = started.kill_rank(rank, at)
        started.wait_for(lambda kill=kill: len(events(started.run, "start")) == kill + 2)
        assert events(started.run, "start")[-1]["step"] > done - 8  # of steps of milliseconds, several share a copy
    started.end()
    assert started.log.read_text().count("a copy in memory") == 2
    assert [event["message"] for event in events(started.run, "restart")] == [
        "starting again (1 of 2): rank 1 was killed by SIGKILL",
        "starting again (1 of 2): rank 0 was killed by SIGKILL",  # there was progress, so the count begins again
    ]
    undisturbed = train(tmp_path / "undisturbed", *SETTINGS, *settings, "checkpoint.every=10 steps", processes=2)
    assert record(started.run.path) == record(undisturbed)
    assert weights(started.run.path) == weights(undisturbed) and len(weights(undisturbed)) == 2


@pytest.mark.slow
def test_a_run_that_insists_on_copies_is_refused_if_nobody_holds_them(train_arguments, tmp_path):
    log = tmp_path / "log"
    assert exit_codes_of(train_arguments(tmp_path / "run", "checkpoint.in_memory=true"), 1, log) == [2]
    assert "checkpoint.in_memory = true needs a launcher that outlives its processes" in log.read_text()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_with_the_launcher_killed_the_run_continues_from_its_checkpoint(launch, train, tmp_path):
    settings = ["zero.stage=1", "train.duration=20 steps", "checkpoint.every=5 steps"]
    first = launch(*settings)
    first.wait_for(lambda: len(events(first.run, "checkpoint")) >= 2 and steps_done(first.run) >= 8)
    first.process.kill()
    first.process.wait()
    again = launch(*settings, resume="auto")
    again.end()
    assert events(again.run, "start")[-1]["step"] % 5 == 0
    assert "a copy in memory" not in again.log.read_text()
    undisturbed = train(tmp_path / "undisturbed", *SETTINGS, *settings, processes=2)
    assert record(again.run.path)[-1] == record(undisturbed)[-1]
    assert weights(again.run.path) == weights(undisturbed)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_that_ends_twice_where_its_copies_end_goes_back_to_the_disk(launch):
    """A copy may hold what makes it fail: here, ranks are killed before they make a step of their own."""
    started = launch("zero.stage=1", "train.duration=200 steps", "checkpoint.every=5 steps")
    started.kill_rank(0, 7)
    for kill in (1, 2):
        started.wait_for(lambda kill=kill: len(events(started.run, "restart")) == kill)
        if kill == 2:
            break
        started.wait_for(lambda: len(ranks_of(started.process.pid)) == 2)
        for pid in ranks_of(started.process.pid).values():
            os.kill(pid, signal.SIGKILL)
    started.wait_for(lambda: len(events(started.run, "start")) == 2)
    assert events(started.run, "start")[-1]["step"] % 5 == 0
    assert "a copy in memory" not in started.log.read_text()


# ---- whether there are copies


def config(**checkpoint):
    return Config.model_validate({"model": {"name": "Ti/16"}, "checkpoint": checkpoint})


def how(settings, *, max_restarts=3, on_gpu=False):
    with restarts(settings, 2, max_restarts, {}, on_gpu=on_gpu) as found:
        return found.fast, found.environment


def test_copies_are_kept_by_default_on_cpus_and_not_if_they_are_off():
    assert how(config())[0] is not None
    for fast, environment in (how(config(in_memory=False)), how(config(), on_gpu=True), how(config(), max_restarts=0)):
        assert fast is None and environment == {}
    assert how(config(in_memory=True), on_gpu=True)[0] is not None


def test_copies_that_do_not_fit_are_left_out_or_refused(monkeypatch, capsys):
    needed = copies.copies_bytes(config())
    monkeypatch.setattr(restarts_module, "free_bytes", lambda: 3 * needed)
    assert how(config())[0] is None
    assert "takes 25% at most" in capsys.readouterr().out
    assert how(config(in_memory=True))[0] is not None
    monkeypatch.setattr(restarts_module, "free_bytes", lambda: needed - 1)
    with pytest.raises(UserError, match="set checkpoint.in_memory=false"):
        how(config(in_memory=True))


def test_copies_that_could_never_help_are_refused():
    with pytest.raises(UserError, match="--max-restarts 0 never restarts from a copy"):
        how(config(in_memory=True), max_restarts=0)


def test_on_several_nodes_each_needs_room_for_its_copies_and_those_of_the_node_before_it(monkeypatch):
    needed = copies.copies_bytes(config(), nodes=4)
    assert needed == copies.copies_bytes(config()) / 2
    world = SimpleNamespace(size=8, node_ranks=range(2), gather=lambda value: [value, ("node-7", None)])
    held = SimpleNamespace(world=world, own="an area", taken_bytes=1000)  # since before a restart
    monkeypatch.setattr(restarts_module, "free_bytes", lambda: needed - 1000)
    check_room(config(in_memory=True), held)
    monkeypatch.setattr(restarts_module, "free_bytes", lambda: needed - 1001)
    with pytest.raises(UserError, match=r"of this node, and of the one before it, take .* GiB are free: set"):
        check_room(config(in_memory=True), held)
    check_room(config(in_memory="auto"), held)  # `fastvit train` has looked
    held.own = None
    check_room(config(in_memory=True), held)


def test_free_memory_is_that_of_the_machine_or_its_container(tmp_path):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 2000 kB\nMemAvailable:  1000 kB\n")
    assert copies.free_bytes(tmp_path) == 1000 * 1024
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/\n")
    (tmp_path / "sys" / "fs" / "cgroup").mkdir(parents=True)
    (tmp_path / "sys" / "fs" / "cgroup" / "memory.max").write_text("600000")
    (tmp_path / "sys" / "fs" / "cgroup" / "memory.current").write_text("500000")
    assert copies.free_bytes(tmp_path) == 100_000
