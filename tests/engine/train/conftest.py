"""Real runs of a tiny model on real digit scans."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from warm_ranks import run_ranks

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
def train_arguments(digits):
    """What follows `fastvit` in the command line of a tiny run."""

    def build(out, *settings, resume="never"):
        everything = [f"data.train={digits}/train-*.tar", *TINY_RUN, *settings]
        arguments = ["train", "quickstart", "--out", str(out), "--resume", resume]
        return arguments + [word for setting in everything for word in ("--set", setting)]

    return build


@pytest.fixture(scope="session")
def train_command(train_arguments):
    """The command line of a tiny run: `train_command(out, "zero.stage=2", processes=2, resume="auto")`."""

    def build(out, *settings, processes=1, resume="never", max_restarts=0):
        command = [sys.executable, "-m", "fastvit_engine", *train_arguments(out, *settings, resume=resume)]
        return [*command, "--cpu-processes", str(processes), "--max-restarts", str(max_restarts)]

    return build


@pytest.fixture(scope="session")
def execute():
    """Runs a command to its end, with one thread a process so that results do not depend on the machine's load."""

    def run(command, **environment):
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)

    return run


@pytest.fixture(scope="session")
def train(train_arguments, tmp_path_factory):
    """Runs a tiny training to its end and returns its run folder. Where it is not the start that is tested."""

    def run(out, *settings, processes=1, resume="never") -> Path:
        log = tmp_path_factory.mktemp("train") / "log"
        assert run_ranks(train_arguments(out, *settings, resume=resume), processes, log), log.read_text()
        return out

    return run
