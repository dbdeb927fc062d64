"""The environment that a launcher prepares for each process of a job. Needs no PyTorch: every command may ask."""

import os
from collections.abc import Mapping, MutableMapping

from fastvit_engine.errors import UserError

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What tells a task how many there are, if a launcher that is not torchrun started several.
_TASK_COUNTS = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
}
VERBOSE = "FASTVIT_VERBOSE"  # set: libraries log what they log by themselves
ERROR_SHOWN = "FASTVIT_ERROR_SHOWN"  # a path: the first failing process creates it, and only that one prints its error


def launched_by_cluster(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether a launcher such as torchrun started this process as a rank of a job. UserError if variables are missing.

    Adds torchrun's variables if another launcher uses other names. UserError also for one of several tasks that were
    started without a rendezvous: each would be a run of its own.
    """
    environment.update(_in_torchrun_names(environment))
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        _check_lone_task(environment)
        return False
    missing = [name for name in LAUNCHER_VARIABLES if name not in environment]
    if missing:
        raise UserError(
            f"the launch environment sets {'RANK' if 'RANK' in environment else 'WORLD_SIZE'} but not "
            f"{', '.join(missing)}: start with torchrun, or unset them to run on this machine alone"
        )
    numbers = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        try:
            numbers[name] = int(environment[name])
        except ValueError:
            raise UserError(f"environment variable {name} is {environment[name]!r}, not an integer") from None
    if not 0 <= numbers["RANK"] < numbers["WORLD_SIZE"]:
        raise UserError(
            f"environment variable RANK is {numbers['RANK']} but WORLD_SIZE is {numbers['WORLD_SIZE']}: "
            "ranks go from 0 to WORLD_SIZE - 1"
        )
    return True


def _check_lone_task(environment: Mapping[str, str]) -> None:
    for launcher, variables in _TASK_COUNTS.items():
        count = next((environment[name] for name in variables if environment.get(name, "").isdigit()), "1")
        if int(count) > 1 and not (launcher == "srun" and "SLURM_STEP_ID" not in environment):
            raise UserError(
                f"{launcher} started {count} tasks without MASTER_ADDR, so each would be a run of its own: start one "
                "task per node that uses all its GPUs (srun --ntasks=1 fastvit train ...), submit launch/slurm/"
                "train.sbatch for several nodes, or export MASTER_ADDR and MASTER_PORT before srun"
            )


def _in_torchrun_names(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables of SLURM's tasks and of DeepSpeed's launcher under torchrun's names.

    A task of srun is a rank only if the job script also exports MASTER_ADDR: an interactive shell is not.
    """
    names: dict[str, str] = {}
    if {"MASTER_ADDR", "SLURM_PROCID", "SLURM_STEP_ID"} <= environment.keys() and "RANK" not in environment:
        slurm = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
        names = {ours: environment[theirs] for ours, theirs in slurm.items() if theirs in environment}
        counts: list[str] = []  # tasks of each node, written as "2(x3),1"
        for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
            count, _, times = part.partition("(x")
            counts += [count] * int(times.rstrip(")") or 1)
        if (node := int(environment.get("SLURM_NODEID", "0"))) < len(counts) and counts[node]:
            names["LOCAL_WORLD_SIZE"] = counts[node]
    elif "LOCAL_SIZE" in environment and "LOCAL_WORLD_SIZE" not in environment:
        names["LOCAL_WORLD_SIZE"] = environment["LOCAL_SIZE"]
    return names


def speaks_for_all() -> bool:
    """True for the first process of the job that fails, which prints the error; without a launcher of ours, for all."""
    marker = os.environ.get(ERROR_SHOWN)
    if marker is None:
        return True
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except OSError:
        return False
    return True
