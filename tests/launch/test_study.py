"""What a job of an array of study.sbatch does, with a SLURM and a Python that only say what they are asked."""

import pytest


@pytest.fixture
def job(script, tmp_path):
    """job(exit code of the study, state of the job) -> what ran, and what was asked of SLURM"""

    def run(code, state="RUNNING"):
        (tmp_path / "bin").mkdir()
        for name, body in {
            "python": f'echo "$@"; exit {code}',
            "squeue": f"echo {state}",
            "scontrol": 'echo "scontrol $*"',
            "sleep": "exit 0",
        }.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        variables = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_JOB_ID": "123", "PYTHON": str(tmp_path / "bin" / "python")}
        path = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
        return script("slurm/study.sbatch", "pooling", "--set", "a=it's 1", "--out", "x", **variables, **path)

    return run


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_job_is_the_run_of_its_number(job, code):
    done = job(code)
    assert done.returncode == code
    assert done.stdout == "-m fastvit_engine study pooling --set a=it's 1 --out x --only 7\n"


def test_a_run_that_was_asked_to_stop_goes_back_into_the_queue(job):
    done = job(76)
    assert done.returncode == 76 and done.stdout.endswith("scontrol requeue 123\n")
    assert "back into the queue" in done.stderr


def test_a_cancelled_run_does_not(job):
    done = job(76, "COMPLETING")
    assert done.returncode == 76 and "scontrol" not in done.stdout
