"""How ranks start that are to train again within seconds of a failure: forked, and with copies of the newest state."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from fastvit_engine.distributed.process import die_with_parent
from fastvit_engine.distributed.rank_server import CannotFork, RankServer
from fastvit_engine.distributed.supervise import Rank, Start, rank_environment
from fastvit_engine.shown import say

_READ_AT_IMPORT = ("OMP_NUM_THREADS",)  # of a rank's variables, by libraries
# NumPy's BLAS starts its threads when it is imported. And whether PyTorch sees a GPU can be asked without opening it.
_OF_SERVER = {"OPENBLAS_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


class FastRestart:
    """Starts ranks that inherit the memory of the copies, from a server that forks them if one can.

    When a signal ends a rank, nothing that the others could still do is worth waiting for.
    """

    grace_after_kill = 0.0  # seconds

    def __init__(
        self,
        modules: Sequence[str],
        descriptors: Sequence[int],
        forget_copies: Callable[[], None],
        processes: int,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        """modules: that a rank imports. descriptors: of the memory that copies are in."""
        self.forget_copies = forget_copies
        self._modules, self._descriptors = modules, descriptors
        of_rank = rank_environment(0, processes, 0, environment)
        early = {name: of_rank[name] for name in _READ_AT_IMPORT if name in of_rank}
        self._environment = {**environment, **early, **_OF_SERVER}
        self._server: RankServer | None = None
        self._forks = True

    def starting(self, arguments: Sequence[str]) -> Start:
        """What starts a rank that runs `fastvit ARGUMENTS`."""
        command = [sys.executable, "-m", "fastvit_engine", *arguments]

        def start(variables: Mapping[str, str]) -> Rank:
            return self._fork(arguments, variables) or subprocess.Popen(
                command, env=dict(variables), preexec_fn=die_with_parent, pass_fds=list(self._descriptors)
            )

        return start

    def close(self) -> None:
        """Ends the server, and with it every rank that is left."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def _fork(self, arguments: Sequence[str], variables: Mapping[str, str]) -> Rank | None:
        """None if there is no server that can; the user hears why, once."""
        problem = None
        for _ in range(2 if self._forks else 0):  # a server that was killed itself is started again
            try:
                self._server = self._server or RankServer(self._modules, self._environment, self._descriptors)
                return self._server.fork(arguments, variables)
            except CannotFork as error:
                problem = error
                self.close()
        if self._forks:
            self._forks = False
            say(
                f"fastvit: warning: each process imports everything itself, so that it starts seconds later: the one "
                f"that was to fork them cannot, because {problem}",
                file=sys.stderr,
            )
        return None
