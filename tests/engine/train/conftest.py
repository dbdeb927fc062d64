"""Real runs of a tiny model on real digit scans, started as users start them: with the `fastvit` command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastvit_engine.data.make import make_dataset

TINY_RUN = [
    "model.name=Ti/4",
    "model.image_size=8",
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "train.duration=20 steps",
    "train.global_batch_size=32",
    "train.log_every=1",
    "data.num_workers=0",
    "data.eval=null",
    "evaluate.every=null",
    "checkpoint.every=null",
]


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """The digit scans as 8 training and 2 evaluation shards."""
    folder = tmp_path_factory.mktemp("digits")
    make_dataset("digits", folder, eval_fraction=0.2, samples_per_shard=200, seed=0, progress=lambda text: None)
    return folder


@pytest.fixture(scope="session")
def train_command(digits):
    """The command line of a tiny run: `train_command(out, "zero.stage=2", processes=2, resume="auto")`."""

    def build(out, *settings, processes=1, resume="never", max_restarts=0):
        everything = [f"data.train={digits}/train-*.tar", *TINY_RUN, *settings]
        command = [sys.executable, "-m", "fastvit_engine", "train", "quickstart", "--out", str(out)]
        command += ["--cpu-processes", str(processes), "--resume", resume]
        command += ["--max-restarts", str(max_restarts)]
        return command + [word for setting in everything for word in ("--set", setting)]

    return build


@pytest.fixture(scope="session")
def execute():
    """Runs a command to its end, with one thread a process so that results do not depend on the machine's load."""

    def run(command, **environment):
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)

    return run


@pytest.fixture(scope="session")
def train(train_command, execute):
    """Runs a tiny training to its end and returns its run folder."""

    def run(out, *settings, **options) -> Path:
        done = execute(train_command(out, *settings, **options))
        assert done.returncode == 0, done.stdout + done.stderr
        return out

    return run
