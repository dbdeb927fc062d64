"""Ranks that are killed continue from copies in memory: the record is the one of a run that nothing happened to."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import pytest

from benchmarks.faults import ranks_of
from fastvit_engine.checkpoint.in_memory import can_hold
from fastvit_engine.config import Config
from fastvit_engine.errors import UserError
from fastvit_engine.files import read_json_lines
from fastvit_engine.observe.metrics import read_metrics
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.sizing import copies
from fastvit_engine.train import restarts as restarts_module
from fastvit_engine.train.restarts import restarts
from tests.in_full import in_full

pytestmark = [pytest.mark.skipif(not can_hold(), reason="needs Linux's memfd_create")]

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SHARD_EVERYTHING = "deepspeed.zero_optimization={stage3_param_persistence_threshold: 0, reduce_bucket_size: 5000}"
THREAD_IN_SERVER = """
import sys, threading
if "fastvit_engine.distributed.rank_server" in " ".join(sys.orig_argv):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
"""
# What has a state of its own: random numbers, an average of the weights, a decaying rate.
SETTINGS = ["train.precision=fp32", "model.dropout=0.1", "ema.decay=0.9", "data.num_workers=1"]


UNTIMED = ["train.log_every=20"]  # until the second row, nothing depends on how long steps take: each has its copy


def record(folder):
    rows, _ = read_metrics(folder / "metrics.jsonl")
    keys = ("step", "samples", "loss", "grad_norm", "lr", "samples_hash", "flops")
    return [tuple(row[key] for key in keys) for row in rows]


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def killing(rank, step, folder):
    """A variable that has a rank killed in this step of its process, the first time."""
    return {"FASTVIT_TEST_KILL": f"{rank} {step} {folder / 'killed'}"}


def steps_done(run):
    return run.metrics.read_text().count("samples_hash") if run.metrics.exists() else 0


def events(run, kind):
    lines = run.events.read_text().splitlines() if run.events.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]


class Launched:
    """`fastvit train` in a process group of its own."""

    def __init__(self, command, run, log, environment):
        self.run, self.log = run, log
        with open(log, "a") as file:
            self.process = subprocess.Popen(
                command, env=ENVIRONMENT | environment, stdout=file, stderr=file, start_new_session=True
            )

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

    def begin(*settings, resume="never", **environment):
        run = RunFolder(tmp_path / "run")
        command = train_command(run.path, *SETTINGS, *settings, processes=2, resume=resume, max_restarts=2)
        started.append(Launched(command, run, tmp_path / "log", environment))
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


@pytest.fixture
def spoiled(digits, tmp_path):
    """The digits, every seventh of which is no image."""
    folder = tmp_path / "spoiled"
    folder.mkdir()
    for shard in sorted(digits.glob("train-*.tar")):
        with tarfile.open(shard) as source, tarfile.open(folder / shard.name, "w") as target:
            for number, member in enumerate(source):
                content = source.extractfile(member).read()
                if not member.name.endswith(".cls") and number % 7 == 0:
                    content = b"no image"
                member.size = len(content)
                target.addfile(member, io.BytesIO(content))
    return folder


@pytest.mark.slow
@pytest.mark.distributed
def test_a_kill_between_two_rows_costs_one_step_and_loses_no_count(launch, train, spoiled, tmp_path, monkeypatch):
    settings = [f"data.train={spoiled}/train-*.tar", "data.max_bad_share=0.5", *UNTIMED, "zero.stage=1"]
    settings += ["train.duration=24 steps", "train.objective=tests.fastvit_engine.train.killing:Killing"]
    started = launch(*settings, **killing(1, 17, tmp_path))
    started.end()
    killed_after = 16
    assert [event["step"] for event in events(started.run, "start")][1:] in ([killed_after], [killed_after - 1])
    monkeypatch.setenv("FASTVIT_TEST_KILL", f"9 0 {tmp_path}")  # nobody
    undisturbed = train(tmp_path / "undisturbed", *SETTINGS, *settings, processes=2)
    bad = [row["bad_samples"] for row in read_metrics(undisturbed / "metrics.jsonl")[0]]
    assert bad == sorted(bad) and bad[-1] > bad[0]
    assert [row["bad_samples"] for row in read_metrics(started.run.metrics)[0]] == bad
    assert record(started.run.path) == record(undisturbed)
    assert weights(started.run.path) == weights(undisturbed)
    named = [
        sorted(map(str, read_json_lines(folder / "bad_samples.jsonl"))) for folder in (started.run.path, undisturbed)
    ]
    assert named[0] == named[1]


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_that_nobody_can_fork_are_started_as_processes_and_continue_from_their_copies(launch, tmp_path):
    """Here the server has a second thread, which no fork would take along."""
    (tmp_path / "sitecustomize.py").write_text(THREAD_IN_SERVER)
    settings = [
        *UNTIMED,
        "zero.stage=1",
        "train.duration=12 steps",
        "train.objective=tests.fastvit_engine.train.killing:Killing",
    ]
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    started = launch(*settings, PYTHONPATH=path, **killing(0, 8, tmp_path))
    started.end()
    log = started.log.read_text()
    assert log.count("each process imports everything itself") == 1
    assert "cannot, because what it imports has started 1 more thread" in log
    assert log.count("a copy in memory") == 1 and events(started.run, "start")[1]["step"] in (6, 7)


@pytest.mark.slow
def test_a_run_that_insists_on_copies_is_refused_if_nobody_holds_them(train_arguments, execute, tmp_path):
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
    command = [sys.executable, "-m", "fastvit_engine", *train_arguments(tmp_path / "run", "checkpoint.in_memory=true")]
    refused = execute(command, **alone)
    assert refused.returncode == 2
    assert "checkpoint.in_memory = true needs a launcher that outlives its processes" in refused.stderr
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


def test_free_memory_is_that_of_the_machine_or_its_container(tmp_path):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 2000 kB\nMemAvailable:  1000 kB\n")
    assert copies.free_bytes(tmp_path) == 1000 * 1024
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/\n")
    (tmp_path / "sys" / "fs" / "cgroup").mkdir(parents=True)
    (tmp_path / "sys" / "fs" / "cgroup" / "memory.max").write_text("600000")
    (tmp_path / "sys" / "fs" / "cgroup" / "memory.current").write_text("500000")
    assert copies.free_bytes(tmp_path) == 100_000
