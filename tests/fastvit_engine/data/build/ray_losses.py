"""`--ray` on clusters that lose workers, nodes and commands, or whose nodes differ; each test has its own cluster."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ray.cluster_utils import Cluster

import fastvit_engine
from fastvit_engine.data.build import ray_cluster
from fastvit_engine.data.build.make import make_dataset
from fastvit_engine.data.build.parallel import parallel_map
from fastvit_engine.errors import UserError
from tests.fastvit_engine.data.build.ray_cases import STORE, contents


@pytest.fixture
def large(tmp_path):
    """1,200 images that take a while to encode."""
    folder = tmp_path / "large"
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    for number in range(1200):
        path = folder / f"class{number % 3}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(np.roll(pixels, number)).save(path)
    return folder


@pytest.fixture
def other_cluster():
    """A head without a CPU and two nodes, and nobody connected to them."""
    node = {"object_store_memory": STORE}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 0, "include_dashboard": False})
    cluster.nodes = [cluster.add_node(**node, num_cpus=1) for _ in range(2)]
    yield cluster
    cluster.shutdown()


def start(source: Path, out: Path, address: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "fastvit_engine", "data", "make", str(source), "--out", str(out)]
    command += ["--samples-per-shard", "40", "--resize", "64", "--ray", address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_shards(out: Path, count: int, process: subprocess.Popen) -> set[Path]:
    """The shards that are complete once there are `count`: those with a receipt."""
    receipts = out / "dataset.unfinished" / "receipts"
    while len(shards := {out / path.stem for path in receipts.glob("*.tar.json")}) < count:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    return shards


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["worker", "node", "command", "interrupted command"])
def test_what_is_lost_while_shards_are_written_changes_no_byte(lost, large, other_cluster, tmp_path):
    make_dataset(str(large), tmp_path / "one", samples_per_shard=40, resize=64)
    out = tmp_path / "many"
    process = start(large, out, other_cluster.address)
    complete = wait_for_shards(out, 3, process)
    if lost == "worker":
        for worker in workers():
            os.kill(worker, signal.SIGKILL)
    elif lost == "node":
        other_cluster.remove_node(other_cluster.nodes[0], allow_graceful=False)
    else:
        process.send_signal(signal.SIGKILL if lost == "command" else signal.SIGINT)
        said = process.communicate(timeout=240)[0]
        assert process.returncode == (-signal.SIGKILL if lost == "command" else 130), said
        times = {path: path.stat().st_mtime_ns for path in complete}
        process = start(large, out, other_cluster.address)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert contents(tmp_path / "one") == contents(out)
    assert "Traceback" not in said and "(raylet)" not in said
    if lost.endswith("command"):
        assert "shards are complete, making the others" in said
        assert {path: path.stat().st_mtime_ns for path in complete} == times


def workers() -> list[int]:
    """The processes of this machine that run tasks of shards."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                if (folder / "cmdline").read_bytes().startswith(b"ray::run_task"):
                    found.append(int(folder.name))
            except OSError:
                continue
    assert found
    return found


@pytest.mark.slow
@pytest.mark.parametrize("node", ["has no package", "has other code", "has other code and joins later"])
def test_a_node_on_which_shards_might_differ_is_refused(node, other_cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Ray lets workers import from the folder of the command
    package = tmp_path / "installed" / "fastvit_engine"
    if node == "has no package":
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise ImportError('there is no package')")
    else:
        shutil.copytree(Path(fastvit_engine.__file__).parent, package)
        with (package / "data" / "build" / "encode.py").open("a") as file:
            file.write("# changed\n")
    code = r"node \S+ \(........\) of the Ray cluster has other code of fastvit-engine 0\.1\.0 than the machine of this"
    words = r"cannot load fastvit_engine \(.*\): install the version" if node == "has no package" else code

    def add_node() -> None:
        other_cluster.add_node(
            num_cpus=1,
            object_store_memory=STORE,
            env_vars={"PYTHONPATH": f"{package.parent}:{os.environ.get('PYTHONPATH', '')}"},
        )

    def wait(number: int) -> None:
        time.sleep(0.2)

    if not node.endswith("later"):
        add_node()
    with (
        ray_cluster.ray_cluster(other_cluster.address, None, print) as executor,
        pytest.raises(UserError, match=words),
    ):
        executor.check([])
        add_node()
        list(parallel_map(wait, range(300), workers=executor))
