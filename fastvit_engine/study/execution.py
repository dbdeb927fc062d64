"""Trains the runs of a study, one after the other, each as a `fastvit train` of its own."""

import contextlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvit_engine.distributed.process import die_with_parent
from fastvit_engine.distributed.supervise import Requests
from fastvit_engine.errors import EXIT_PREEMPTED, UserError
from fastvit_engine.observe.units import format_duration, format_share
from fastvit_engine.shown import shown
from fastvit_engine.study.pace import Pace
from fastvit_engine.study.planning import PlannedRun
from fastvit_engine.study.records import BEGUN, FAILED, FINISHED, StudyFolder, figures_of

_TAIL = 1 << 16  # bytes of a log in which the sentence of a failure is looked for
_ERROR = "fastvit: error: "


@dataclass
class Executor:
    """Trains runs and writes their records. `command`: of `fastvit`, before its arguments."""

    folder: StudyFolder
    shots: int | None
    cpu_processes: int
    pace: Pace
    say: Callable[[str], None]
    command: Sequence[str] = (sys.executable, "-m", "fastvit_engine")
    failed: list[PlannedRun] = field(default_factory=list)

    def train(self, runs: Sequence[PlannedRun], settled: Callable[[], None]) -> int:
        """Trains what is not finished; a run that fails is named, and the others follow.

        settled: called after each. Returns the exit code: 0; 1 if a run failed; 76 if a signal asked to stop.
        """
        self.folder.records(runs)  # raises UserError if they are of another study
        requests = Requests()
        with requests.passed_on():
            for place, run in enumerate(runs):
                code = self._train(run, f"[{place + 1} of {len(runs)}]", runs[place + 1 :], requests)
                settled()
                if code == EXIT_PREEMPTED or (requests.first is not None and place + 1 < len(runs)):
                    self.say("stopped on request: the same command continues")
                    return EXIT_PREEMPTED
        return 1 if self.failed else 0

    def _train(self, run: PlannedRun, place: str, later: Sequence[PlannedRun], requests: Requests) -> int:
        self.say(f"{place} {run.title}: {run.steps:,} steps; log: {self.folder.log(run)}")
        words = train_arguments(run, self.folder.run(run), self.cpu_processes)
        shown_command = shlex.join(["fastvit", *words])
        self.folder.write(run, BEGUN, command=shown_command)
        began = time.monotonic()
        with self._log(run) as log:
            child = subprocess.Popen(
                [*self.command, *words], stdout=log, stderr=subprocess.STDOUT, preexec_fn=die_with_parent
            )
            requests.pass_on_to([child])
            code = child.wait()
            requests.pass_on_to([])
        seconds = time.monotonic() - began
        if code == EXIT_PREEMPTED or (code != 0 and requests.first is not None):
            return EXIT_PREEMPTED
        facts: dict[str, Any] = {"command": shown_command, "seconds": seconds}
        if code == 0:
            try:
                facts |= figures_of(self.folder.run(run), self.shots)
            except UserError as error:
                return self._fail(run, str(error), facts)
            self.folder.write(run, FINISHED, **facts)
            self.pace.measure(run.computed_flops, facts["train_seconds"], seconds)
            left = self.pace.left(later)
            self.say(f"    {reached(facts, self.shots)}, {format_duration(seconds)}{f'; {left}' if left else ''}")
            return 0
        return self._fail(run, _sentence(self.folder.log(run), code), facts)

    def _fail(self, run: PlannedRun, sentence: str, facts: dict[str, Any]) -> int:
        self.failed.append(run)
        self.folder.write(run, FAILED, failed=sentence, **facts)
        self.say(f"    failed: {sentence}")
        return 1

    @contextmanager
    def _log(self, run: PlannedRun) -> Iterator[Any]:
        path = self.folder.log(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as log:
            yield log


def train_arguments(run: PlannedRun, folder: Path, cpu_processes: int) -> list[str]:
    """What follows `fastvit` in the command of a run."""
    settings = [word for override in run.overrides for word in ("--set", override)]
    processes = [] if cpu_processes == 1 else ["--cpu-processes", str(cpu_processes)]
    return ["train", run.recipe, *settings, *processes, "--out", str(folder), "--resume", "auto"]


def reached(figures: dict[str, Any], shots: int | None) -> str:
    """The figures of a run, for people."""
    parts = [f"top-1 {format_share(figures['top1'])}"] if "top1" in figures else []
    if f"fewshot{shots}" in figures:
        parts.append(f"{shots}-shot {format_share(figures[f'fewshot{shots}'])}")
    return ", ".join(parts)


def _sentence(log: Path, code: int) -> str:
    """Why a command failed: its own sentence, or else how it ended and where to look."""
    lines: list[str] = []
    with contextlib.suppress(FileNotFoundError), open(log, "rb") as file:  # somebody may have removed it
        file.seek(0, 2)
        file.seek(max(0, file.tell() - _TAIL))
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        if line.startswith(_ERROR):
            return shown(line.removeprefix(_ERROR))
    ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"fastvit train {ended}: see {log}"
