import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastvit_engine.data.build.make import make_dataset

REPOSITORY = Path(__file__).parents[2]
LAUNCH = REPOSITORY / "launch"


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A folder of shards to train on and to evaluate on, with their index."""
    folder = tmp_path_factory.mktemp("shards")
    make_dataset("digits", folder, eval_fraction=0.1, samples_per_shard=2000, seed=0, progress=lambda text: None)
    return folder


@pytest.fixture(scope="session")
def quick_python(tmp_path_factory):
    """A Python that answers how many GPUs there are without importing PyTorch, which takes seconds."""
    path = tmp_path_factory.mktemp("bin") / "python"
    path.write_text(f'#!/bin/sh\ncase "$*" in *device_count*) echo 0;; *) exec {sys.executable} "$@";; esac\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def script(tmp_path, quick_python):
    """Runs a script of launch/ in an empty folder."""

    def run(name, *arguments, **variables):
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/kernels",
            "PYTHON": quick_python,
            "TMPDIR": str(tmp_path),
        }
        for chosen in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TRITON_CACHE_DIR"):
            environment.pop(chosen, None)
        environment.update(variables)
        command = ["bash", str(LAUNCH / name), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    return run
