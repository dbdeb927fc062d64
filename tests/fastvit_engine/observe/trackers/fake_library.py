"""A tracker's library that writes what it is told to a file, and that fails in the way the project's name says."""

import json
import sys
import time
from pathlib import Path

from fastvit_engine.observe.trackers.child import TrackedRun


class Run:
    def __init__(self, run: TrackedRun) -> None:
        print("hello from the library")
        print("and an error", file=sys.stderr)
        self.does, self.file = run.project, Path(run.folder) / "told.jsonl"
        self.tell(open=run.id, name=run.name, config=run.config)
        self.on("open")

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.on("log")
        self.tell(step=step, **numbers)

    def close(self, *, finished: bool) -> None:
        self.on("close")
        self.tell(finished=finished)

    def on(self, moment: str) -> None:
        if self.does == f"fails to {moment}":
            raise RuntimeError(f"no {moment}\nhttps://me:secret@host/ is gone")
        if self.does == f"hangs to {moment}":
            time.sleep(1000)

    def tell(self, **facts: object) -> None:
        with open(self.file, "a") as file:
            file.write(json.dumps(facts) + "\n")


def open_run(run: TrackedRun) -> Run:
    return Run(run)
