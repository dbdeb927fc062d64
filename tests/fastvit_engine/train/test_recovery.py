"""Runs that are killed, and runs whose disk fills up: the same command goes on from the last complete checkpoint."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from fastvit_engine.cli import main
from fastvit_engine.distributed.environment import ERROR_SHOWN
from fastvit_engine.observe.metrics import read_metrics
from tests.fastvit_engine.models.weights.official import random_arrays
from tests.fastvit_engine.train import ill_fated_rank
from tests.fastvit_engine.warm_ranks import exit_codes_of
from tests.in_full import in_full, only_in_full

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 40
KILLS = int(os.environ.get("FASTVIT_TEST_KILLS", 2))  # of the test of random kills
SLOW = 400  # seconds that a run of all steps may take on a machine that does other things too
SETTINGS = [
    f"train.duration={STEPS} steps",
    "train.precision=fp32",
    "model.dropout=0.1",  # its random numbers must be repeated too
    "ema.decay=0.9",
    "checkpoint.every=5 steps",
    "evaluate.every=20 steps",
]


@pytest.fixture(scope="module")
def settings(digits):
    return [*SETTINGS, f"data.eval={digits}/eval-*.tar"]


@pytest.fixture(scope="module")
def uninterrupted(train, settings, tmp_path_factory):
    """What a run that nothing happened to writes down."""
    return record(train(tmp_path_factory.mktemp("uninterrupted") / "run", *settings, processes=2))


def record(run):
    """Every figure of a run that the machine's speed does not enter."""
    training, evaluations = read_metrics(run / "metrics.jsonl")
    steps = [(row["step"], row["loss"], row["grad_norm"], row["lr"], row["samples_hash"]) for row in training]
    return steps, [(row["step"], row["eval"], row["top1"], row["loss"]) for row in evaluations]


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def start_and_kill(command, ready, seconds=120):
    """Starts the run in a session of its own and kills its parent process as soon as `ready()`."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    parent = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + seconds
    while not ready():
        assert parent.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run never got there"
        time.sleep(0.0005)
    parent.send_signal(signal.SIGKILL)
    parent.wait()


@only_in_full
def test_a_killed_launcher_takes_the_run_with_it(train, train_command, settings, tmp_path, uninterrupted):
    run = tmp_path / "run"
    options = {"processes": 2, "resume": "auto"}

    def past_step_23():
        metrics = run / "metrics.jsonl"
        return metrics.exists() and metrics.read_text().count("samples_hash") >= 23

    start_and_kill(train_command(run, *settings, "zero.stage=1", **options), past_step_23)
    goes_on_as(1, 1, train, settings, run, uninterrupted)


@pytest.mark.parametrize(("stage", "then"), [in_full(1, 1), (3, 2)])
def test_killed_in_the_middle_of_training(train, train_arguments, settings, tmp_path, stage, then, uninterrupted):
    run = tmp_path / "run"
    arguments = train_arguments(run, *settings, f"zero.stage={stage}")
    train_until_killed(arguments, tmp_path / "log", partial(ill_fated_rank.after_step, 23))
    goes_on_as(stage, then, train, settings, run, uninterrupted)


def goes_on_as(stage, then, train, settings, run, uninterrupted):
    """A run that was killed after 23 steps at one ZeRO stage ends at another as if nothing had happened."""
    assert (run / "checkpoints" / "latest").read_text() in {"step-00000015", "step-00000020", "step-00000025"}
    train(run, *settings, f"zero.stage={then}", processes=2, resume="auto")
    assert checkpoints(run) == ["latest", "step-00000035", "step-00000040"]
    steps, evaluations = record(run)
    if stage == then:
        assert (steps, evaluations) == uninterrupted  # to the bit
    else:
        assert [step[0] for step in steps] == list(range(1, STEPS + 1))
        assert [step[4] for step in steps] == [step[4] for step in uninterrupted[0]]
        assert [step[1] for step in steps] == pytest.approx([step[1] for step in uninterrupted[0]], abs=1e-5)
        assert evaluations[-1][2] == pytest.approx(uninterrupted[1][-1][2], abs=0.01)


@pytest.fixture(scope="module")
def from_weights(settings, tmp_path_factory):
    """The settings of a run that starts from an official file."""
    path = tmp_path_factory.mktemp("weights") / "weights.npz"
    np.savez(path, **random_arrays(patch=4, width=32, depth=2, heads=2, hidden=128, grid=2))
    return [*settings, f"init.from={path}"]


@pytest.fixture(scope="module")
def uninterrupted_from_weights(train, from_weights, tmp_path_factory):
    return record(train(tmp_path_factory.mktemp("uninterrupted") / "run", *from_weights, processes=2))


_KILLED_AT = """
import os, signal
from fastvit_engine.distributed.world import World
from fastvit_engine.train import first_weights

read, broadcast, sent = first_weights._read, World.broadcast, []

def reading(*arguments):
    weights = read(*arguments)
    sent.append(0)  # from now on, weights are sent
    if {moment!r} == "reading":
        os.kill(os.getpid(), signal.SIGKILL)
    return weights

def sending(*arguments):
    broadcast(*arguments)
    if sent:
        sent.append(1)
        if {moment!r} == "sending" and len(sent) == 9:
            os.kill(os.getpid(), signal.SIGKILL)

first_weights._read, World.broadcast = reading, sending
"""


@pytest.mark.parametrize("moment", [in_full("reading"), in_full("sending")])
def test_killed_while_the_first_weights_are_read_or_sent(
    train, train_command, from_weights, tmp_path, uninterrupted_from_weights, moment
):
    """Rank 0, before the first checkpoint; the same command begins again."""
    run, options = tmp_path / "run", {"processes": 2, "resume": "auto"}
    (tmp_path / "sitecustomize.py").write_text(_KILLED_AT.format(moment=moment))
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    killed = subprocess.run(
        train_command(run, *from_weights, **options), env=variables, capture_output=True, text=True, timeout=SLOW
    )
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr, killed.stderr
    assert not (run / "checkpoints" / "latest").exists() and not (run / "metrics.jsonl").exists()
    train(run, *from_weights, **options)
    assert record(run) == uninterrupted_from_weights


@only_in_full
@pytest.mark.timeout(600 + 100 * KILLS)
def test_a_run_from_weights_is_killed_again_and_again(
    train, train_command, from_weights, tmp_path, uninterrupted_from_weights
):
    kill_again_and_again(train_command, from_weights, tmp_path / "run")
    train(tmp_path / "run", *from_weights, "data.num_workers=1", processes=2, resume="auto")
    assert record(tmp_path / "run") == uninterrupted_from_weights


@only_in_full
@pytest.mark.timeout(600 + 100 * KILLS)
def test_killed_again_and_again_while_workers_change(train, train_command, settings, tmp_path, uninterrupted):
    kill_again_and_again(train_command, settings, tmp_path / "run")
    train(tmp_path / "run", *settings, "data.num_workers=1", processes=2, resume="auto")
    assert record(tmp_path / "run") == uninterrupted


def kill_again_and_again(train_command, settings, run):
    """The run, one of its ranks or one of its data workers, at random moments; each time with other data workers."""
    chance = random.Random(0)
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    kills = 0
    while kills < KILLS:
        workers = f"data.num_workers={chance.randint(0, 3)}"
        command = train_command(run, *settings, workers, processes=2, resume="auto")
        parent = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            assert parent.wait(chance.uniform(0, 12)) == 0
            shutil.rmtree(run)  # it was done before its moment came: from the beginning again
            continue
        victim = chance.choice([parent.pid, *descendants(parent.pid)])
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        ended = parent.wait(SLOW)
        if not (run / "model.safetensors").exists():  # it was not done: all of it ends with the process
            assert ended == -signal.SIGKILL if victim == parent.pid else ended != 0
        kills += 1


def descendants(pid):
    """The processes that `pid` and its children have started; none of one that has ended since it was listed."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return children + [below for child in children for below in descendants(child)]


def train_until_killed(arguments, log, moment):
    """Trains on two ranks that kill themselves, which leaves what they had written by then."""
    codes = exit_codes_of(arguments, 2, log, before=moment)
    assert -signal.SIGKILL in codes and 0 not in codes, log.read_text()


def test_killed_in_the_middle_of_saving(train, train_arguments, settings, tmp_path, uninterrupted):
    run = tmp_path / "run"
    moment = partial(ill_fated_rank.while_saving, "step-00000015")
    train_until_killed(train_arguments(run, *settings), tmp_path / "log", moment)
    assert "step-00000015.partial" in checkpoints(run)
    assert (run / "checkpoints" / "latest").read_text() == "step-00000010"
    train(run, *settings, processes=2, resume="auto")
    assert record(run) == uninterrupted
    assert checkpoints(run) == ["latest", "step-00000035", "step-00000040"]


def test_killed_before_the_first_checkpoint(train, train_arguments, settings, tmp_path, uninterrupted):
    run = tmp_path / "run"
    arguments = train_arguments(run, *settings, "checkpoint.every=35 steps")
    train_until_killed(arguments, tmp_path / "log", partial(ill_fated_rank.after_step, 2))
    assert [step[0] for step in record(run)[0]] == [1, 2]
    train(run, *settings, processes=2, resume="auto")
    assert record(run) == uninterrupted


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with 3 MB, for which root is needed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def impatient(tmp_path):
    """The environment of processes that wait for a disk for two seconds, and say what they have said to the end."""
    (tmp_path / "sitecustomize.py").write_text("from fastvit_engine.observe import disk\ndisk.PATIENCE_SECONDS = 2.0\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}


def test_a_full_disk_keeps_the_previous_checkpoint(
    train, train_arguments, settings, small_disk, tmp_path, uninterrupted
):
    run, log, ballast = small_disk / "run", tmp_path / "log", small_disk / "ballast"
    moment = partial(ill_fated_rank.fill_disk, ballast, "step-00000010")
    environment = {ERROR_SHOWN: str(tmp_path / "shown")}  # as a launcher makes sure that one rank speaks
    codes = exit_codes_of(train_arguments(run, *settings), 2, log, lambda rank: environment, before=moment)
    latest, errors = run / "checkpoints" / "latest", log.read_text()
    assert codes == [75, 75], errors
    assert errors.count("fastvit: error:") == 1
    assert "could not be written" in errors
    assert "the previous checkpoint is intact; make room and run the same command again" in errors
    assert not [name for name in checkpoints(run) if name.endswith(".partial")]
    assert latest.read_text() in checkpoints(run)

    ballast.unlink()
    train(run, *settings, processes=2, resume="auto")
    assert record(run) == uninterrupted


@only_in_full
def test_a_full_disk_in_the_middle_of_a_run_is_named(train_command, small_disk, settings, impatient):
    run = small_disk / "run"
    command = train_command(run, *settings, "checkpoint.every=null", "train.duration=100000 steps")
    process = subprocess.Popen(command, env=impatient, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size > 1000) and time.monotonic() < deadline:
        time.sleep(0.01)
    with open(small_disk / "ballast", "wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(bytes(4096))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert errors.count("fastvit: error:") == 1
    sentence = r"metrics\.jsonl could not be written for \d+ s \(No space left on device\): make room"
    assert re.search(sentence, errors), errors


@only_in_full
def test_a_full_disk_that_gets_room_in_time_changes_nothing(train_command, small_disk, settings, uninterrupted):
    run = small_disk / "run"
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # no save makes room for the metrics, nor fails three times
    command = train_command(run, *settings, "checkpoint.every=null", processes=2)
    process = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("samples_hash") >= 12) and time.monotonic() < deadline:
        time.sleep(0.001)
    ballast = small_disk / "ballast"
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    time.sleep(5)
    ballast.unlink()
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert record(run) == uninterrupted


def test_settings_of_the_optimizer_are_those_of_the_resumed_command(train, tmp_path):
    norms = {}
    for decay in (0, 50):
        start = [
            "schedule.warmup=0 steps",
            "schedule.kind=constant",
            "train.precision=fp32",
            "optimizer.weight_decay=0",
        ]
        run = train(tmp_path / str(decay), *start, "train.duration=3 steps")
        train(run, *start, "train.duration=6 steps", f"optimizer.weight_decay={decay}", resume="auto")
        norms[decay] = load_file(run / "model.safetensors")["blocks.0.mlp.fc1.weight"].norm().item()
    assert norms[50] < 0.9 * norms[0]


def test_a_finished_run_says_so_and_changes_nothing(train, train_arguments, capsys, tmp_path):
    run = train(tmp_path / "run", "train.duration=3 steps", "schedule.warmup=0 steps")
    before = (run / "metrics.jsonl").read_bytes()
    assert main(train_arguments(run, "train.duration=3 steps", "schedule.warmup=0 steps", resume="auto")) == 0
    assert f"{run} is complete, with 3 steps: nothing to do" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_longer_duration_continues_a_finished_run(train, tmp_path):
    short = ["train.duration=3 steps", "schedule.warmup=0 steps", "schedule.kind=constant"]
    run = train(tmp_path / "run", *short)
    train(run, *short, "train.duration=5 steps", resume="auto")
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")[0]] == [1, 2, 3, 4, 5]
    manifest = json.loads((run / "checkpoints" / "step-00000005" / "manifest.json").read_text())
    assert manifest["step"] == manifest["state"]["step"] == 5
