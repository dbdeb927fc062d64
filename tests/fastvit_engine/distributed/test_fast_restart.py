"""How ranks start that inherit the memory of copies: forked, and as processes of their own if nobody can fork them."""

import os
import signal
import sys

import pytest

from fastvit_engine.distributed.fast_restart import FastRestart
from fastvit_engine.distributed.rank_server import ForkedRank

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="relies on Linux")

# In place of the engine's command, in ranks of both kinds: writes its rank into the memory that it has inherited.
WRITES = "import os; os.pwrite(int(os.environ['SHARED']), os.environ['RANK'].encode(), int(os.environ['RANK']))\n"
IN_PROCESSES = f"import sys\nif sys.orig_argv[1:3] == ['-m', 'fastvit_engine']:\n    {WRITES}"
IN_FORKS = (
    f"import sys, types\nsys.modules['fastvit_engine.cli'] = types.SimpleNamespace(main=lambda: exec({WRITES!r}))\n"
)
THREADED = "import threading, time\nthreading.Thread(target=time.sleep, args=[60], daemon=True).start()\n"


@pytest.fixture
def attempt(tmp_path):
    """attempt(module): starts two ranks, of a server that imports it; returns what they wrote, and the ranks."""
    for name, program in {"sitecustomize": IN_PROCESSES, "stand_in": IN_FORKS, "threaded": THREADED}.items():
        (tmp_path / f"{name}.py").write_text(program)
    shared, path = os.memfd_create("shared"), [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "SHARED": str(shared)}
    made = {}

    def start(module, kill_server=False):
        if module not in made:
            made[module] = FastRestart([module], [shared], lambda: None, 2, environment)
        if kill_server:
            os.kill(made[module]._server._process.pid, signal.SIGKILL)
            made[module]._server._process.wait()
        os.ftruncate(shared, 0)
        begin = made[module].starting(["--version"])
        ranks = [begin({**environment, "RANK": str(rank)}) for rank in range(2)]
        assert [rank.wait(60) for rank in ranks] == [0, 0]
        return os.pread(shared, 10, 0), ranks

    yield start
    for fast in made.values():
        fast.close()
    os.close(shared)


def test_ranks_are_forked_again_also_after_their_server_was_killed(attempt, capfd):
    for kill_server in (False, True):
        written, ranks = attempt("stand_in", kill_server)
        assert written == b"01" and all(isinstance(rank, ForkedRank) for rank in ranks)
    assert "warning" not in capfd.readouterr().err


def test_ranks_that_nobody_can_fork_are_processes_with_the_same_memory_and_the_user_hears_of_it_once(attempt, capfd):
    for _ in range(2):
        written, ranks = attempt("threaded")
        assert written == b"01" and not any(isinstance(rank, ForkedRank) for rank in ranks)
    said = capfd.readouterr().err
    assert said.count("each process imports everything itself") == 1
    assert "cannot, because what it imports has started 1 more thread" in said
