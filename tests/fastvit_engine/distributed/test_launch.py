import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastvit_engine.distributed import launch, supervise
from fastvit_engine.errors import UserError
from fastvit_engine.observe.events import read_events
from fastvit_engine.observe.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("hangups_arrive")


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


def test_a_failing_process_ends_the_others_and_gives_its_exit_code(fake_engine, monkeypatch):
    monkeypatch.setattr(supervise, "_GRACE_SECONDS", 0.5)
    fake_engine("import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(7)\ntime.sleep(60)\n")
    start = time.monotonic()
    outcome = launch.run_processes([], 2)
    assert outcome.codes == {1: 7}
    assert outcome.exit_code == 7
    assert time.monotonic() - start < 20


def test_success_needs_every_process(fake_engine):
    fake_engine("import os, pathlib\npathlib.Path('rank' + os.environ['RANK']).touch()\n")
    assert launch.run_processes([], 3).exit_code == 0
    assert sorted(name for name in os.listdir() if name.startswith("rank")) == ["rank0", "rank1", "rank2"]


ATTEMPTS = """
import os, pathlib, signal, sys
rank, log = os.environ["RANK"], pathlib.Path("attempts" + os.environ["RANK"])
attempt = len(log.read_text().splitlines()) if log.exists() else 0
with log.open("a") as file: print(*sys.argv[1:], file=file)
def latest(name):
    pathlib.Path("run/checkpoints").mkdir(parents=True, exist_ok=True)
    pathlib.Path("run/checkpoints/latest").write_text(name)
"""


def attempts(rank):
    return Path(f"attempts{rank}").read_text().splitlines()


def test_starts_again_after_a_killed_rank_and_after_code_75(fake_engine):
    fake_engine(
        ATTEMPTS + "if attempt == 0 and rank == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.exit([75, 75, 0][attempt])\n"
    )
    run = RunFolder(Path("run"))
    assert launch.run_with_restarts(["train", "--resume", "never"], 2, run, max_restarts=3) == 0
    assert attempts(0) == attempts(1) == ["train --resume never"] + ["train --resume never --resume auto"] * 2
    causes = [event["message"] for event in read_events(run) if event["event"] == "restart"]
    assert causes == [
        "starting again (1 of 3): rank 1 was killed by SIGKILL",
        "starting again (2 of 3): exit code 75 of rank 0, 1",
    ]


@pytest.mark.parametrize("code", [1, 2, 76])
def test_never_starts_again_after(fake_engine, code):
    fake_engine(ATTEMPTS + f"sys.exit({code})\n")
    assert launch.run_with_restarts([], 1, RunFolder(Path("run")), max_restarts=3) == code
    assert len(attempts(0)) == 1


def test_gives_up_after_so_many_restarts_without_a_new_checkpoint(fake_engine, capfd):
    fake_engine(ATTEMPTS + "latest(['a', 'a', 'b', 'b', 'b', 'b'][attempt])\nsys.exit(75)\n")
    asked = []

    def newest():
        """A disk that cannot be read in between is no new checkpoint, and no end of the run."""
        asked.append(1)
        if len(asked) == 3:
            raise OSError(errno.EIO, "Input/output error")
        latest = Path("run/checkpoints/latest")
        return latest.read_text() if latest.exists() else None

    run = RunFolder(Path("run"))
    assert launch.run_with_restarts([], 1, run, max_restarts=2, progress=newest) == 75
    assert len(attempts(0)) == 5  # one more for each of 'a', and 'b' from its second time on
    assert "giving up after 2 restarts without a new checkpoint: exit code 75 of rank 0" in capfd.readouterr().err


@pytest.mark.parametrize("lost", [False, True])
def test_whose_run_it_is_is_asked_before_a_restart_and_again_if_the_disk_cannot_say(fake_engine, lost):
    fake_engine(ATTEMPTS + "sys.exit([75, 0][attempt])\n")
    answers = [OSError(errno.ESTALE, "Stale file handle"), UserError("it belongs to another run") if lost else None]

    def check():
        if (answer := answers.pop(0)) is not None:
            raise answer

    run = RunFolder(Path("run"))
    if lost:
        with pytest.raises(UserError, match="it belongs to another run"):
            launch.run_with_restarts([], 1, run, max_restarts=1, check_owner=check)
    else:
        assert launch.run_with_restarts([], 1, run, max_restarts=1, check_owner=check) == 0
    assert len(attempts(0)) == (1 if lost else 2) and not answers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_requests_are_passed_on_and_end_restarts(fake_engine, number):
    fake_engine(
        ATTEMPTS + "import time\n"
        f"signal.signal({int(number)}, lambda number, frame: sys.exit(76 if rank == '0' else 75))\n"
        "pathlib.Path('ready' + rank).touch()\ntime.sleep(60)\n"
    )
    code = "from pathlib import Path\nfrom fastvit_engine.distributed import launch\n"
    code += "from fastvit_engine.observe.run_folder import RunFolder"
    code += "\nsys.exit(launch.run_with_restarts([], 2, RunFolder(Path('run')), max_restarts=3))"
    root = str(Path(launch.__file__).parents[2])
    parent = subprocess.Popen([sys.executable, "-c", f"import sys; sys.path[0] = {root!r}\n{code}"])
    deadline = time.monotonic() + 60
    while not (Path("ready0").exists() and Path("ready1").exists()) and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.send_signal(number)
    assert parent.wait(60) == 76
    assert len(attempts(0)) == len(attempts(1)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="relies on Linux's parent-death signal")
def test_killing_the_parent_leaves_no_process_behind(fake_engine):
    fake_engine("import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(60)\n")
    code = "from fastvit_engine.distributed import launch\nlaunch.run_processes([], 1)"
    root = str(Path(launch.__file__).parents[2])
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
