"""`--ray`: the same shards, indexes, verdicts and sentences as on one machine, from a Ray cluster of several nodes."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image
from ray.cluster_utils import Cluster

from fastvit_engine.cli import main
from fastvit_engine.data.build import ray_cluster, ray_worker
from fastvit_engine.data.build.make import make_dataset
from fastvit_engine.data.build.parallel import Counter, ordered_map, parallel_map
from fastvit_engine.errors import UserError

STORE = 80 * 2**20  # bytes, the smallest object store that Ray takes


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU each, and this process connected to them."""
    node = {"num_cpus": 1, "object_store_memory": STORE}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    with ray_cluster.connected(cluster.address):
        yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def kept_executor(cluster):
    with ray_cluster.ray_cluster(None, None, print) as executor:
        yield executor


@pytest.fixture
def executor(kept_executor):
    kept_executor.check([])  # forgets what the test before has asked of the nodes
    return kept_executor


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """60 images of 3 classes, two of them the same."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(60):
        path = folder / f"class{number % 3}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    shutil.copy(folder / "class0" / "0.png", folder / "class0" / "copy.png")
    return folder


def make(photos: Path, out: Path, *options: str) -> list[str]:
    return ["data", "make", str(photos), "--out", str(out), "--samples-per-shard", "5", "--resize", "24", "--dedup",
            *options]  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a data set by name, but for the index, which has the times of the shards."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "shards.index"}


def test_make_index_and_verify_are_equal_to_one_machine(cluster, photos, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)  # relative paths mean the same on every node
    assert main(make(photos, Path("one"), "--workers", "2")) == 0
    capfd.readouterr()
    assert main(make(photos, Path("many"), "--ray", cluster.address)) == 0
    shown = capfd.readouterr()
    assert f"Ray cluster {cluster.address}: 2 nodes, 2 CPUs\n" in shown.err
    assert "60 images" in shown.out or "train samples" in shown.out
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    assert json.loads((tmp_path / "many" / "dataset.json").read_text())["duplicates"] == 1
    assert {path.name for path in (tmp_path / "many").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}

    for options in (["--out", "here.index"], ["--out", "there.index", "--ray", "auto"]):
        assert main(["data", "index", "many/*.tar", *options]) == 0
    assert (tmp_path / "here.index").read_bytes() == (tmp_path / "there.index").read_bytes()

    (tmp_path / "many" / "train-000001.tar").write_bytes((tmp_path / "many" / "train-000001.tar").read_bytes()[:3000])
    verdicts = []
    for options in ([], ["--ray"]):
        capfd.readouterr()
        assert main(["data", "verify", "many", "--json", *options]) == 1
        verdicts.append(json.loads(capfd.readouterr().out))
    assert verdicts[0] == verdicts[1]
    assert verdicts[0]["errors"]["damaged shard"]["count"] == 1


def test_tasks_run_on_every_node_and_only_their_results_come_back(executor):
    def where(number: int) -> str:
        time.sleep(0.3)
        return ray.get_runtime_context().get_node_id()

    nodes = {node["NodeID"] for node in ray.nodes()}
    assert {node for _, node in parallel_map(where, range(8), workers=executor)} == nodes
    assert list(ordered_map(lambda number: -number, range(20), workers=executor)) == [-n for n in range(20)]
    assert list(parallel_map(where, [], workers=executor)) == []


def test_tasks_end_with_their_map_and_none_begins_later(executor, tmp_path):
    def work(number: int) -> None:
        for _ in range(1000):
            with open(tmp_path / str(number), "a") as file:
                file.write("x")
            time.sleep(0.02)

    def interrupt() -> None:
        if any(tmp_path.iterdir()):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(parallel_map(work, range(20), workers=executor, while_waiting=interrupt))
    written = contents(tmp_path)
    assert written
    assert list(ordered_map(lambda number: -number, range(20), workers=executor)) == [-n for n in range(20)]
    time.sleep(3)  # within which Ray starts the killed tasks again
    assert contents(tmp_path) == written


def test_a_killed_worker_is_replaced_and_its_images_count_once(executor, tmp_path, capfd):
    done = Counter()
    done.add(100)  # of an earlier run

    def work(number: int) -> int:
        for _ in range(10):
            done.add()
        assert done.value >= 100
        if number == 3 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number * number

    assert list(ordered_map(work, range(6), workers=executor)) == [n * n for n in range(6)]
    assert (tmp_path / "killed").exists()
    assert done.value == 160
    time.sleep(0.5)  # in which Ray would tell of it
    assert capfd.readouterr() == ("", "")


def test_errors_are_those_of_one_machine(executor, photos, tmp_path):
    def refuse(number: int) -> None:
        raise UserError("this is wrong")

    def crash(number: int) -> None:
        raise KeyError("a bug")

    with pytest.raises(UserError, match="^this is wrong$"):
        list(parallel_map(refuse, range(4), workers=executor))
    with pytest.raises(RuntimeError, match=r"(?s)in crash.*KeyError: 'a bug'"):
        list(parallel_map(crash, range(4), workers=executor))

    source = shutil.copytree(photos, tmp_path / "photos")
    (source / "class1" / "1.png").write_bytes(b"no image")
    said = []
    for workers in (2, executor):
        with pytest.raises(UserError) as error:
            make_dataset(str(source), tmp_path / "out", samples_per_shard=5, workers=workers)
        said.append(str(error.value))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert said[0] == said[1]
    assert "class1/1.png" in said[0] and "--max-failed" in said[0]


def test_no_task_runs_after_the_iterator_is_closed(executor, tmp_path):
    def tell(number: int) -> int:
        if number > 1:
            (tmp_path / str(os.getpid())).touch()
            time.sleep(60)
        return number

    results = parallel_map(tell, range(6), workers=executor)
    assert {next(results)[1], next(results)[1]} == {0, 1}
    results.close()
    for path in tmp_path.iterdir():
        assert not Path("/proc", path.name).exists()


def test_a_node_that_sees_other_files_or_has_another_version_is_named(executor, tmp_path, monkeypatch):
    node = r"^node \S+ \([0-9a-f]{8}\) of the Ray cluster "
    shared = tmp_path / "shared"
    shared.mkdir()
    executor.check([str(tmp_path), __file__], shared)
    file = os.open(__file__, os.O_RDONLY)
    folder = os.open(shared, os.O_RDONLY)
    try:  # paths that only this process has
        with pytest.raises(UserError, match=rf"{node}cannot read /proc/self/fd/{file} \(No such file or directory\)"):
            executor.check([f"/proc/self/fd/{file}"])
        with pytest.raises(UserError, match=rf"{node}does not see the folder /proc/self/fd/{folder} of this machine"):
            executor.check([], Path(f"/proc/self/fd/{folder}"))
    finally:
        executor._remove_token()
        os.close(file)
        os.close(folder)
    assert not list(shared.iterdir())
    versions = ray_worker.identity()
    for changed, words in (
        ({"pillow": "1.0"}, rf"has pillow {versions['pillow']} and not the 1.0 of the machine of this command"),
        ({"code": "0"}, rf"has other code of fastvit-engine {versions['fastvit-engine']} than the machine of this"),
    ):
        monkeypatch.setattr(ray_cluster, "identity", lambda changed=changed: versions | changed)
        with pytest.raises(UserError, match=node + words):
            executor.check([])
    monkeypatch.undo()
    executor.check([])


def test_without_ray_the_sentence_says_what_to_install(monkeypatch, tmp_path, capsys):
    for name in ("ray_cluster", "ray_worker"):
        monkeypatch.delitem(sys.modules, f"fastvit_engine.data.build.{name}")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["data", "verify", str(tmp_path), "--ray"]) == 2
    assert capsys.readouterr().err == "fastvit: error: --ray needs the package ray: pip install 'fastvit-engine[ray]'\n"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--ray", "ray://head:10001"], "run the command on a node of the cluster, with --ray auto"),
        (["--ray", "data/photos"], "'data/photos' is neither HOST:PORT nor auto: put --ray last if it has no address"),
        (["--ray", "auto", "--part", "1/2"], "--part and --ray both share out the work: leave out one of them"),
    ],
)
def test_addresses_and_options_that_are_refused(options, sentence, capsys, tmp_path):
    try:
        code = main(["data", "make", "digits", "--out", str(tmp_path / "out"), *options])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert sentence in capsys.readouterr().err


# ---- opt-in: a cluster for each, and processes that are killed


@pytest.mark.slow
def test_a_task_that_always_kills_its_worker_ends_with_a_sentence(executor):
    def die(number: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(UserError, match="was lost 4 times, perhaps for lack of memory .*: run the same command again"):
        list(parallel_map(die, range(2), workers=executor))


def test_an_address_at_which_nothing_listens(monkeypatch):
    sentence = (
        r"^the Ray cluster 127\.0\.0\.1:9 cannot be reached \(Connection refused\): run the command on one of its nod"
    )
    with pytest.raises(UserError, match=sentence), ray_cluster.connected("127.0.0.1:9"):
        pass
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(UserError, match=sentence), ray_cluster.connected(None):
        pass
