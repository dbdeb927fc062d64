"""What a process makes of the environment that a launcher gave it."""

import pytest

from fastvit_engine.distributed.environment import LAUNCHER_VARIABLES, launched_by_cluster
from fastvit_engine.errors import UserError

WHOLE = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SLURM = {
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "20000",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


def test_recognises_a_cluster_launch():
    assert launched_by_cluster(WHOLE)
    assert not launched_by_cluster({})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MASTER_ADDR": None}, "sets RANK but not MASTER_ADDR"),
        ({"RANK": None}, "sets WORLD_SIZE but not RANK"),
        ({"LOCAL_RANK": None, "MASTER_PORT": None}, "not LOCAL_RANK, MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not an integer"),
        ({"RANK": "2"}, "RANK is 2 but WORLD_SIZE is 2"),
        ({"RANK": "-1"}, "ranks go from 0"),
    ],
)
def test_half_an_environment_is_refused(change, message):
    environment = {name: value for name, value in (WHOLE | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        launched_by_cluster(environment)


def test_a_task_of_slurm_is_a_rank():
    environment = dict(SLURM)
    assert launched_by_cluster(environment)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    assert [environment[name] for name in names] == ["3", "1", "4", "2"]


@pytest.mark.parametrize(("node", "size"), [("0", "2"), ("1", "2"), ("2", "2"), ("3", "1")])
def test_nodes_of_slurm_may_differ(node, size):
    environment = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_STEP_NUM_TASKS": "7", "SLURM_NODEID": node}
    assert launched_by_cluster(environment)
    assert environment["LOCAL_WORLD_SIZE"] == size


@pytest.mark.parametrize("change", [{"SLURM_STEP_ID": None}, {"MASTER_ADDR": None, "SLURM_STEP_NUM_TASKS": "1"}])
def test_a_shell_under_slurm_is_no_rank(change):
    """The script of a job, whose number of tasks is that of its steps, or `srun --pty bash`."""
    environment = {name: value for name, value in (SLURM | {"SLURM_NTASKS": "4"} | change).items() if value is not None}
    assert not launched_by_cluster(environment)
    assert "RANK" not in environment


@pytest.mark.parametrize(
    ("launcher", "variables"),
    [
        ("srun", {name: value for name, value in SLURM.items() if name != "MASTER_ADDR"}),
        ("srun", {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}),
        ("mpirun", {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}),
        ("mpirun", {"PMI_SIZE": "4", "PMI_RANK": "3"}),
    ],
)
def test_several_tasks_that_cannot_meet_are_refused(launcher, variables):
    with pytest.raises(UserError, match=f"{launcher} started 4 tasks without MASTER_ADDR, so each would be a run"):
        launched_by_cluster(dict(variables))
    one = {name: "1" if value == "4" else value for name, value in variables.items()}
    assert not launched_by_cluster(one)  # the advice: one task
    if launcher == "srun":  # the other one
        assert launched_by_cluster(SLURM | variables)


def test_torchrun_inside_a_task_of_slurm_has_the_say():
    environment = SLURM | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    assert launched_by_cluster(environment)
    assert environment["RANK"] == "0"


def test_half_a_task_of_slurm_is_refused():
    environment = {name: value for name, value in SLURM.items() if name not in ("SLURM_LOCALID", "MASTER_PORT")}
    with pytest.raises(UserError, match="sets RANK but not LOCAL_RANK, MASTER_PORT"):
        launched_by_cluster(environment)


def test_deepspeed_says_how_many_ranks_a_host_has():
    environment = dict.fromkeys(LAUNCHER_VARIABLES, "1") | {"WORLD_SIZE": "4", "LOCAL_SIZE": "2"}
    assert launched_by_cluster(environment)
    assert environment["LOCAL_WORLD_SIZE"] == "2"
