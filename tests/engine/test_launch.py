import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastvit_engine import launch
from fastvit_engine.errors import UserError

WHOLE = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_recognises_a_cluster_launch():
    assert launch.launched_by_cluster(WHOLE)
    assert not launch.launched_by_cluster({})


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
        launch.launched_by_cluster(environment)


def test_rank_environment_passes_its_own_check():
    environment = launch.rank_environment(1, 3, launch.free_port())
    assert launch.launched_by_cluster(environment)
    assert environment["RANK"] == "1"
    assert environment["WORLD_SIZE"] == "3"


@pytest.fixture
def fake_engine(tmp_path, monkeypatch):
    """A package of the engine's name whose __main__ is the given code, found first by `python -m fastvit_engine`."""

    def write(code):
        package = tmp_path / "fastvit_engine"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(code)
        monkeypatch.chdir(tmp_path)

    return write


def test_a_failing_process_ends_the_others_and_gives_its_exit_code(fake_engine):
    fake_engine("import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(7)\ntime.sleep(60)\n")
    start = time.monotonic()
    assert launch.run_processes([], 2) == 7
    assert time.monotonic() - start < 20


def test_success_needs_every_process(fake_engine):
    fake_engine("import os, pathlib\npathlib.Path('rank' + os.environ['RANK']).touch()\n")
    assert launch.run_processes([], 3) == 0
    assert sorted(name for name in os.listdir() if name.startswith("rank")) == ["rank0", "rank1", "rank2"]


@pytest.mark.skipif(sys.platform != "linux", reason="relies on Linux's parent-death signal")
def test_killing_the_parent_leaves_no_process_behind(fake_engine):
    fake_engine("import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(60)\n")
    code = "from fastvit_engine import launch\nlaunch.run_processes([], 1)"
    root = os.path.dirname(os.path.dirname(launch.__file__))
    parent = subprocess.Popen([sys.executable, "-c", f"import sys; sys.path[0] = {root!r}\n{code}"])
    deadline = time.monotonic() + 30
    pid = Path("pid")
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(pid.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(child)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False
