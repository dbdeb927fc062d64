"""What a process does that `warm_ranks` forks. Importing this takes no time: each of them does so first."""

import gc
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def run_rank(
    arguments: Sequence[str], environment: dict[str, str], log: Path, before: Callable[[], None] | None
) -> None:
    """`fastvit ARGUMENTS`, after `before()`."""
    gc.freeze()  # what was there before the fork is neither looked through nor, for that, copied
    os.environ.update(environment)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from fastvit_engine.cli import main

    if before is not None:
        before()
    raise SystemExit(main(arguments))


def run_program(source: str, *arguments: str) -> None:
    """As `before`: the rank runs this program, as `python -c` does, in place of the command."""
    sys.argv = ["-c", *arguments]
    exec(compile(source, "the program", "exec"), {"__name__": "__main__"})
    raise SystemExit
