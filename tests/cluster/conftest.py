"""A tiny run on real digit scans, started on several hosts as users start it: with the scripts of `launch/`."""

import os
import sys
from pathlib import Path

import pytest

from fastvit_engine.data.build.make import make_dataset
from fastvit_engine.files import atomic_write
from tests.cluster.harness import REPOSITORY, STEPS, Jobs, losses
from tests.cluster.hosts import Hosts, missing
from tests.fastvit_engine.warm_ranks import run_ranks


@pytest.fixture(scope="session")
def hosts():
    """Three hosts on a network of their own."""
    if reason := missing():
        pytest.skip(reason)
    with Hosts(3) as three:
        yield three


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    make_dataset("digits", folder, eval_fraction=0.2, samples_per_shard=200, seed=0, progress=lambda text: None)
    return folder


@pytest.fixture(scope="session")
def training(digits):
    """What stands behind `fastvit train`: `training(out, "zero.stage=3")`."""

    def arguments(out, *settings):
        everything = [
            f"data.train={digits}/train-*.tar",
            "data.eval=null",
            "data.num_workers=0",
            "model={name: Ti/4, num_classes: 10, image_size: 8, width: 32, depth: 2, heads: 2}",
            f"train={{duration: {STEPS} steps, global_batch_size: 36, log_every: 1, precision: fp32}}",
            "schedule.warmup=2 steps",
            "evaluate.every=null",
            "checkpoint.every=4 steps",
            *settings,
        ]
        return ["quickstart", *(word for setting in everything for word in ("--set", setting)), "--out", str(out)]

    return arguments


@pytest.fixture(scope="session")
def environment():
    """Of every process on every host: one thread each, no GPU, this working tree."""
    path = f"{REPOSITORY}:{REPOSITORY}/kernels"
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": path,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


@pytest.fixture(scope="session")
def single(training, tmp_path_factory):
    """The losses of the run in a single process."""
    folder = tmp_path_factory.mktemp("single")
    log = folder / "log"
    assert run_ranks(["train", *training(folder / "run", "zero.stage=0")], 1, log), log.read_text()
    return losses(folder / "run")


@pytest.fixture
def jobs(hosts, tmp_path, environment):
    running = Jobs(hosts, tmp_path, environment)
    yield running
    running.close()


@pytest.fixture
def slowly(tmp_path, monkeypatch, environment):
    """Makes every step take a while, so that what happens happens during the run."""
    folder = tmp_path / "slowly"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os\n"
        "if 'RANK' in os.environ:\n"
        "    import time\n"
        "    from fastvit_engine.train import loop\n"
        "    step = loop.take_step\n"
        "    def slow_step(*arguments, **options):\n"
        "        time.sleep(1.0)\n"
        "        return step(*arguments, **options)\n"
        "    loop.take_step = slow_step\n"
    )
    monkeypatch.setitem(environment, "PYTHONPATH", f"{folder}:{environment['PYTHONPATH']}")


@pytest.fixture
def pace(tmp_path, monkeypatch, environment):
    """`pace(steps)` lets runs do that many steps and then wait there for more, or until they are asked to leave."""
    folder = tmp_path / "pace"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os\n"
        "if 'RANK' in os.environ:\n"
        "    import time\n"
        "    from fastvit_engine.train import loop\n"
        "    take_step = loop.take_step\n"
        "    def step_in_time(job, step, *arguments, **options):\n"
        f"        while step >= int(open({str(folder / 'steps')!r}).read()) and not job.processes.preemption.signal:\n"
        "            time.sleep(0.02)\n"
        "        return take_step(job, step, *arguments, **options)\n"
        "    loop.take_step = step_in_time\n"
        "    from fastvit_engine.checkpoint.in_memory import Copies\n"
        "    Copies.settle = lambda *arguments: None  # a copy after each step, however slow this machine is\n"
    )
    monkeypatch.setitem(environment, "PYTHONPATH", f"{folder}:{environment['PYTHONPATH']}")

    def allow(steps):
        atomic_write(folder / "steps", str(steps))

    allow(10**9)
    return allow
