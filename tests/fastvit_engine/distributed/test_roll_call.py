"""Ranks that start while one of them ends because of bad input, each a process of its own."""

import json
import time
from functools import partial

import pytest

from fastvit_engine.distributed import roll_call
from fastvit_engine.distributed.supervise import free_port, rank_environment
from tests.fastvit_engine.warm_rank import run_program
from tests.fastvit_engine.warm_ranks import exit_codes_of
from tests.in_full import in_full

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

CALL = """
import json, os, sys, time
from fastvit_engine.distributed.roll_call import call_roll, tell_that_this_rank_ends
from fastvit_engine.errors import RestartError, UserError
patience, ranks = float(sys.argv[1]), json.loads(sys.argv[2])
late, ends = ranks[int(os.environ["RANK"])]
time.sleep(late)
if ends:
    tell_that_this_rank_ends(ends)
    sys.exit(2)
try:
    store = call_roll(patience)
except (UserError, RestartError) as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
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
def test_a_run_ends_on_all_ranks_if_one_has_no_recipe(train_arguments, call, tmp_path, served):
    """As on a host without the file; the ranks are started as srun starts them, or with a launcher's store."""
    arguments = train_arguments(tmp_path / "run")
    codes, outputs = call(TRAIN, 3, json.dumps(arguments), served=served)
    assert codes == [2, 2, 2]
    errors = [[line for line in output.splitlines() if line.startswith("fastvit: error: ")] for output in outputs]
    assert [len(lines) for lines in errors] == [1, 1, 1]
    assert "here.yaml" in errors[2][0]
    for (line,) in errors[:2]:
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
