"""The process in which the library of a tracker runs: reads a run and its rows from stdin, and answers on stdout."""

import importlib
import json
import os
import signal
import sys
from typing import IO, Any, NamedTuple, Protocol

from fastvit_engine.shown import brief, shown

OPEN = b"open\n"  # the answer once the library has opened the run; any other line says what went wrong


class TrackedRun(NamedTuple):
    """What a tracker is told of a run when it opens it."""

    id: str  # 32 hexadecimal digits, the same at every start of the run
    name: str  # for people
    project: str
    folder: str  # the run folder on this machine, absolute
    total_steps: int
    config: dict[str, Any]  # without secrets


class OpenRun(Protocol):
    """A run in the library of a tracker; modules of this package have a function `open_run` that returns one."""

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Takes the numbers of one row."""

    def close(self, *, finished: bool) -> None:
        """Sends what is left, and says whether training is complete."""


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it ends when stdin does
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # libraries greet
    try:
        serve(sys.argv[1], sys.stdin.buffer, answers)
    except Exception as error:
        words = " ".join(str(error).split())
        answers.write(shown(f"{type(error).__name__}: {brief(words)}\n".replace("\n", " ")).encode() + b"\n")
        answers.close()
        os._exit(1)  # without what the library would still try


def serve(module: str, lines: IO[bytes], answers: IO[bytes]) -> None:
    """Logs the rows of `lines` to the run that their first line describes, until `null` or their end."""
    run = TrackedRun(**json.loads(lines.readline()))
    opened: OpenRun = importlib.import_module(module).open_run(run)
    answers.write(OPEN)
    last_step = 0
    for line in lines:
        if (row := json.loads(line)) is None:
            break
        last_step = row["step"]
        opened.log(last_step, row["numbers"])
    opened.close(finished=last_step >= run.total_steps)


if __name__ == "__main__":
    main()
