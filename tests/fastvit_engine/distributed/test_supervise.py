"""The processes of a job on this machine: how they are started, ended, and judged."""

import time

import pytest

from fastvit_engine.distributed import supervise
from fastvit_engine.distributed.environment import launched_by_cluster


def test_rank_environment_passes_its_own_check():
    environment = supervise.rank_environment(1, 3, supervise.free_port())
    assert launched_by_cluster(environment)
    assert environment["RANK"] == "1"
    assert environment["WORLD_SIZE"] == "3"


@pytest.mark.parametrize(
    ("codes", "exit_code", "restartable"),
    [
        ({0: 0, 1: 0}, 0, False),
        ({0: 75, 1: 75}, 75, True),
        ({0: 75, 1: -9}, 137, True),
        ({0: -6}, 134, True),
        ({0: 75, 1: 2}, 2, False),  # bad input, which the others only see as a lost peer
        ({0: 1, 1: 2}, 2, False),
        ({0: 76, 1: 76}, 76, False),
        ({0: 76, 1: -9}, 76, False),
        ({0: 1, 1: 75}, 1, False),  # a traceback
        ({0: 143, 1: 143}, 143, False),  # asked twice
    ],
)
def test_what_the_exit_codes_of_ranks_mean_for_the_job(codes, exit_code, restartable):
    outcome = supervise.LaunchOutcome(codes)
    assert (outcome.exit_code, outcome.restartable) == (exit_code, restartable)


@pytest.mark.parametrize(("codes", "code"), [({2, 75}, 2), ({76, 1}, 76), ({75}, 75), ({1}, 75), ({-9, 0}, 75)])
def test_a_cluster_is_told_to_start_again_unless_that_is_pointless(codes, code):
    assert supervise.cluster_exit_code(codes) == code


def test_a_job_on_one_machine_talks_over_loopback():
    environment = supervise.rank_environment(0, 2, 1, {})
    assert environment["MASTER_ADDR"] == "127.0.0.1"
    assert (environment["GLOO_SOCKET_IFNAME"], environment["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")


def test_what_the_caller_sets_takes_precedence_over_what_a_rank_would_get():
    given = {"OMP_NUM_THREADS": "3", "GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "eth8", "RANK": "9"}
    assert given | {"RANK": "1"} == {
        name: value for name, value in supervise.rank_environment(1, 2, 1, given).items() if name in given
    }


def test_no_rank_outlives_the_block():
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), supervise.start_ranks(["sleep", "60"], 2) as ranks:
        raise KeyboardInterrupt
    assert [rank.returncode for rank in ranks] == [-9, -9]
    assert time.monotonic() - start < 30
