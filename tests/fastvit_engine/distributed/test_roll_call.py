"""Ranks that start while one of them ends because of bad input, each a process of its own."""

import json
import socket
import time
from functools import partial

import pytest

from fastvit_engine.distributed import roll_call
from fastvit_engine.distributed.supervise import free_port, rank_environment
from fastvit_engine.errors import Preempted, RestartError, UserError
from tests.fastvit_engine.warm_rank import run_program
from tests.fastvit_engine.warm_ranks import exit_codes_of
from tests.in_full import in_full

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

CALL = """
import json, os, sys, time
from fastvit_engine.distributed.roll_call import call_roll, end_with_others
from fastvit_engine.errors import RestartError, UserError
patience, ranks = float(sys.argv[1]), json.loads(sys.argv[2])
late, ends = ranks[int(os.environ["RANK"])]
time.sleep(late)
try:
    if ends:
        raise UserError(ends)
    store = call_roll(patience)
except (UserError, RestartError) as error:
    os._exit(end_with_others(error, lambda text: print(text, flush=True)))
print("all here", flush=True)
time.sleep(1)  # the store lives as long as rank 0 does
"""


TRAIN = """
import json, os, sys
from fastvit_engine.cli import main
arguments = json.loads(sys.argv[1])
if os.environ["RANK"] == "2":
    arguments[arguments.index("quickstart")] = "here.yaml"
sys.exit(main(arguments))
"""
# what a rank says has a place of its own
APART = """
import os, sys
os.dup2(os.open(sys.argv.pop() + os.environ["RANK"], os.O_WRONLY | os.O_CREAT), 1)
os.dup2(1, 2)
"""


@pytest.fixture
def call(tmp_path):
    """call(program, ranks, arguments...) -> exit codes, and what each rank printed.

    served: by a store of the launcher, not of rank 0. world: of so many ranks in all.
    """

    def run(program, ranks, *arguments, served=False, world=None, seconds=60):
        port = free_port()

        def alone(rank):
            return rank_environment(rank, world or ranks, port) | {"TORCHELASTIC_USE_AGENT_STORE": "False"}

        environment_of = (lambda rank: {}) if served else alone
        before = partial(run_program, APART + program, *arguments, f"{tmp_path}/said-by-")
        codes = exit_codes_of([], ranks, tmp_path / "log", environment_of, seconds, before)
        return codes, [(tmp_path / f"said-by-{rank}").read_text().strip() for rank in range(ranks)]

    return run


@pytest.fixture
def job(call):
    """job([(seconds late, sentence of bad input or ""), ...]) -> exit codes, and what each rank printed."""

    def run(ranks, patience=60, **options):
        return call(CALL, len(ranks), str(patience), json.dumps(ranks), **options)

    return run


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
    sentence = f"rank {ended} on {socket.gethostname()}: the file is missing: copy it"
    assert outputs == [sentence if rank == ended else "" for rank in range(3)]


@pytest.mark.parametrize("served", [in_full(False), True])
def test_one_of_all_ranks_says_what_all_would_say(job, served):
    codes, outputs = job([(0, "typing error"), (0.5, "typing error"), (1, "typing error")], served=served, seconds=30)
    assert codes == [2, 2, 2]
    assert sorted(outputs) == ["", "", "typing error"]


@pytest.mark.parametrize("served", [in_full(True), False])
def test_different_faults_are_one_sentence_with_rank_and_host(job, served):
    faults = [(0.5, "no file a"), (0, ""), (1, "no file b"), (0, "no file a")]
    codes, outputs = job(faults, served=served, seconds=30)
    assert codes == [2, 2, 2, 2]
    host = socket.gethostname()
    assert "".join(outputs) == f"ranks 0, 3 on {host}: no file a; rank 2 on {host}: no file b"
    assert sorted(outputs)[:3] == ["", "", ""]


def test_ranks_that_never_start_are_named(job):
    codes, outputs = job([(0, "")], patience=3, world=3)
    assert codes == [75]
    assert outputs == ["ranks 1, 2 of 3 did not start within 3 s: see what they and their hosts say"]


@pytest.mark.parametrize("served", [False, in_full(True)])
def test_a_run_ends_on_all_ranks_if_one_has_no_recipe(train_arguments, call, tmp_path, served):
    """As on a host without the file; the ranks are started as srun starts them, or with a launcher's store."""
    arguments = train_arguments(tmp_path / "run")
    codes, outputs = call(TRAIN, 3, json.dumps(arguments), served=served)
    assert codes == [2, 2, 2]
    errors = [[line for line in output.splitlines() if line.startswith("fastvit: error: ")] for output in outputs]
    assert [len(lines) for lines in errors] == [0, 0, 1]
    (line,) = errors[2]
    assert line.startswith("fastvit: error: rank 2 on ") and "here.yaml" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("served", [False, in_full(True)])
@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("data.train=nowhere", "nowhere, which does not exist: copy it there or correct it"),  # rank 0 finds it
        ("train.global_batch_size=1", "fewer images than the 2 processes"),  # each finds it
    ],
)
def test_what_ranks_find_when_they_have_joined_is_one_line(train_arguments, call, tmp_path, setting, sentence, served):
    arguments = train_arguments(tmp_path / "run", setting)
    codes, outputs = call(TRAIN, 2, json.dumps(arguments), served=served)
    assert codes == [2, 2]
    (line,) = "\n".join(outputs).strip().splitlines()
    assert line.startswith("fastvit: error: ") and line.count(sentence) == 1


def test_a_rank_that_nobody_can_hear_speaks_for_itself_and_does_not_wait_for_long(monkeypatch):
    monkeypatch.setattr(roll_call, "_TELL_SECONDS", 0.5)
    monkeypatch.setattr(roll_call, "_SPEAK_SECONDS", 0.2)
    start, spoken = time.monotonic(), []
    for address in ("127.0.0.1", "nowhere.invalid"):
        variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": str(free_port())}
        assert roll_call.end_with_others(UserError("bad"), spoken.append, variables) == 2
    assert roll_call.end_with_others(RestartError("lost"), spoken.append, {"RANK": "0", "WORLD_SIZE": "1"}) == 75
    alone = f"rank 1 on {socket.gethostname()}: bad"
    assert spoken == [alone, alone, "lost"]
    assert time.monotonic() - start < 25


def test_of_a_job_that_has_saved_only_the_first_rank_says_so():
    for rank in ("0", "1"):
        spoken = []
        code = roll_call.end_with_others(Preempted("saved"), spoken.append, {"RANK": rank, "WORLD_SIZE": "2"})
        assert (code, spoken) == (76, ["saved"] if rank == "0" else [])


def test_a_sentence_names_a_few_of_many_ranks():
    assert roll_call._few("rank", [3]) == "rank 3"
    assert roll_call._few("rank", list(range(20))) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"
