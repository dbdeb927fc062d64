"""Ranks that start while one of them ends because of bad input, each a process of its own."""

import os
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from fastvit_engine.distributed import roll_call
from fastvit_engine.distributed.supervise import free_port, rank_environment
from tests.in_full import in_full

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

CALL = """
import sys, time
from fastvit_engine.distributed.roll_call import call_roll, tell_that_this_rank_ends
from fastvit_engine.errors import RestartError, UserError
patience, late, ends = float(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
time.sleep(late)
if ends:
    tell_that_this_rank_ends(ends)
    sys.exit(2)
try:
    store = call_roll(patience)
except (UserError, RestartError) as error:
    print(error)
    sys.exit(error.exit_code)
print("all here")
time.sleep(1)  # the store lives as long as rank 0 does
"""


@pytest.fixture
def job():
    """job([(seconds late, sentence of bad input or ""), ...]) -> exit codes, and what each rank printed."""
    started = []

    def run(ranks, patience=60, seconds=60, served=False, world=None):
        server = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False) if served else None
        port = server.port if server else free_port()
        for rank, (late, ends) in enumerate(ranks):
            environment = {**os.environ, **rank_environment(rank, world or len(ranks), port)}
            environment["TORCHELASTIC_USE_AGENT_STORE"] = str(served)
            command = [sys.executable, "-c", CALL, str(patience), str(late), ends]
            started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        deadline = time.monotonic() + seconds
        outputs = [process.communicate(timeout=deadline - time.monotonic())[0].strip() for process in started]
        return [process.returncode for process in started], outputs

    yield run
    for process in started:
        process.kill()


@pytest.mark.parametrize("served", [in_full(False), True])
def test_ranks_that_start_at_different_times_meet(job, served):
    assert job([(0, ""), (1, ""), (0.5, "")], served=served) == ([0, 0, 0], ["all here"] * 3)


@pytest.mark.parametrize(
    ("served", "ended", "late"),
    [
        (False, 0, 0),
        (True, 2, 2),
        *(in_full(False, *case) for case in [(0, 2), (1, 0), (2, 2)]),
        *(in_full(True, *case) for case in [(0, 0), (0, 2), (1, 0)]),
    ],
)
def test_all_ranks_end_with_the_sentence_of_the_one_that_cannot_join(job, served, ended, late):
    """Whether it ends before the others have started, or while they wait."""
    ranks = [(late, "the file is missing: copy it") if rank == ended else (2 - late, "") for rank in range(3)]
    codes, outputs = job(ranks, served=served)
    assert codes == [2, 2, 2]
    for rank, output in enumerate(outputs):
        assert rank == ended or (
            output.startswith(f"rank {ended} on ") and output.endswith(" has ended: the file is missing: copy it")
        )


def test_all_may_end_for_the_same_reason(job):
    assert job([(0, "typing error")] * 3, seconds=30)[0] == [2, 2, 2]


def test_ranks_that_never_start_are_named(job):
    codes, outputs = job([(0, "")], patience=3, world=3)
    assert codes == [75]
    assert outputs == ["ranks 1, 2 of 3 did not start within 3 s: see what they and their hosts say"]


@pytest.mark.parametrize("served", [False, in_full(True)])
def test_a_run_ends_on_all_ranks_if_one_has_no_recipe(train_command, tmp_path, served):
    """As on a host without the file; the ranks are started as srun starts them, or with a launcher's store."""
    server = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False) if served else None
    command, port = train_command(tmp_path / "run"), server.port if server else free_port()
    ranks = []
    for rank in range(3):
        words = ["here.yaml" if rank == 2 and word == "quickstart" else word for word in command]
        environment = {**os.environ, **rank_environment(rank, 3, port), "LOCAL_WORLD_SIZE": "3"}
        environment["TORCHELASTIC_USE_AGENT_STORE"] = str(served)
        ranks.append(subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [2, 2, 2]
    assert "here.yaml" in errors[2]
    for error in errors[:2]:
        (line,) = [line for line in error.splitlines() if line.startswith("fastvit: error: ")]
        assert line.startswith("fastvit: error: rank 2 on ") and "here.yaml" in line
    assert not (tmp_path / "run").exists()


def test_a_rank_that_nobody_can_hear_does_not_wait_for_long(monkeypatch):
    monkeypatch.setattr(roll_call, "_TELL_SECONDS", 0.5)
    start = time.monotonic()
    for address in ("127.0.0.1", "nowhere.invalid"):
        variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": str(free_port())}
        roll_call.tell_that_this_rank_ends("bad", variables)
    roll_call.tell_that_this_rank_ends("bad", {"RANK": "0", "WORLD_SIZE": "1"})
    assert time.monotonic() - start < 25
