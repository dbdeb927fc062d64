"""A time limit that comes when a check is where a test wants it, however slow the machine is."""

import os
import select
import time
from collections.abc import Callable
from pathlib import Path

from fastvit_engine.doctor.isolated import Isolated, Outcome, Send, stopping

_PATIENCE = 120.0  # seconds


class Limit:
    """The limit of a check that calls `near` and then does what has no end.

    It comes when the process has the state of /proc/PID/stat: "S" asleep, "R" running or waiting for a core.
    """

    def __init__(self, state: str) -> None:
        self._state = state
        self._coming, self._comes = os.pipe()

    def near(self) -> None:
        os.write(self._comes, b"x")

    def run(self, check: Callable[[Send], None], seconds: float) -> Outcome:
        """As `run_isolated`."""
        with stopping([Isolated(check, _PATIENCE)]) as (one,):
            assert select.select([self._coming], [], [], _PATIENCE)[0], "the check has not come near its limit"
            deadline = time.monotonic() + _PATIENCE
            while state_of(one._process) != self._state:
                assert time.monotonic() < deadline, f"the check is in state {state_of(one._process)}"
                time.sleep(0.005)
            one._seconds, one._deadline = seconds, time.monotonic()
            return one.wait()


def state_of(process: int) -> str:
    """As /proc tells it; "gone" if there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "gone"
