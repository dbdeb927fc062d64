"""Goodput: which share of the time a run trains while its processes are killed, and whether its record is the same.

A recipe is trained twice to the same step: in peace and without copies in memory, and with a SIGKILL of a random rank
every so many seconds. Rows are logged after every step, and read as they come. Of the disturbed run,

* a step is useful if its row is in the final record; its time is that between its row and the one before. The first
  step after a start has no such time: it counts as the median step;
* goodput is the time of all useful steps over that from the first row to the last;
* a kill costs the steps that are done again, and the seconds until the first step that had not been done before.

The same machine's load is in both times. Only rows that depend on the clock may differ between the two runs.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks.machine import describe
from fastvit_engine.errors import UserError
from fastvit_engine.evaluate.themes import Theme, canvas, save, title_of
from fastvit_engine.observe.metrics import read_all_metrics
from fastvit_engine.observe.run_folder import RunFolder

TRIAL_STEPS = 12  # that say how many fit into the minutes that are asked for
POLL_SECONDS = 0.01
TIMED = {"images_per_second", "mfu", "data_wait", "forward", "backward", "update", "memory_bytes", "seconds"}
Say = Callable[[str], None]


class Seen(NamedTuple):
    """A row of a step, and when it came, in seconds since the run was begun."""

    at: float
    step: int


class Kill(NamedTuple):
    """A SIGKILL of a rank."""

    at: float
    rank: int
    step: int  # done when it came


def measure(args: Namespace, folder: Path, say: Say) -> dict[str, Any]:
    """Both runs, in `folder`, and what came of them. UserError if a run fails."""
    settings, environment = [*args.set, "train.log_every=1"], describe(torch.device("cpu"))
    if args.minutes is not None:
        trial = follow(RunFolder(folder / "trial"), args, [*settings, f"train.duration={TRIAL_STEPS} steps"], say)
        steps = max(TRIAL_STEPS, round(60 * args.minutes / median(gaps(trial.rows))))
        settings.append(f"train.duration={steps} steps")
    calm, disturbed = RunFolder(folder / "calm"), RunFolder(folder / "disturbed")
    in_peace = follow(calm, args, [*settings, "checkpoint.in_memory=false"], say)
    killed = follow(disturbed, args, [*settings, "checkpoint.in_memory=true"], say, kill_every=args.every)
    return {
        "suite": "faults",
        "environment": environment,
        "load_average": os.getloadavg()[2],
        "recipe": args.recipe,
        "settings": settings,
        "processes": args.processes,
        "kill_every": args.every,
        "seed": args.seed,
        **judged(in_peace, killed, [start_step(event) for event in events_of(disturbed) if event["event"] == "start"]),
        "record_equal": record_of(calm) == record_of(disturbed),
        "weights_equal": weights_of(calm) == weights_of(disturbed),
    }


class Followed(NamedTuple):
    """What was seen of a run."""

    rows: list[Seen]
    kills: list[Kill]


def follow(run: RunFolder, args: Namespace, settings: Sequence[str], say: Say, kill_every: float = 0) -> Followed:
    """Trains to the end, and kills a random rank every so many seconds after the first step; 0: none.

    A kill waits until there is a new step after the last one.
    """
    say(f"{run.name}: {' '.join(settings)}")
    words = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "fastvit_engine", "train", args.recipe, "--out", str(run.path)]
    command += ["--cpu-processes", str(args.processes), "--max-restarts", "10", *words]
    chance, rows, kills = random.Random(args.seed), list[Seen](), list[Kill]()
    run.path.parent.mkdir(parents=True, exist_ok=True)
    with open(run.path.parent / f"{run.name}.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            began, ended, reader = time.monotonic(), False, Rows(run.metrics)
            while not ended:
                ended = process.poll() is not None
                now = time.monotonic() - began
                rows += [Seen(now, step) for step in reader.new()]
                since = kills[-1].at if kills else rows[0].at if rows else now
                due = kill_every and not ended and now - since >= kill_every
                moved = not kills or rows[-1].step > kills[-1].step  # or it would be a failure without progress
                if due and moved and (ranks := ranks_of(process.pid)):
                    rank = chance.choice(sorted(ranks))
                    os.kill(ranks[rank], signal.SIGKILL)
                    kills.append(Kill(now, rank, rows[-1].step))
                    say(f"{now:.0f} s: killed rank {rank} after step {rows[-1].step}")
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise UserError(f"the run in {run} ended with exit code {process.returncode}: see {log.name}")
    return Followed(rows, kills)


class Rows:
    """The training rows that are appended to a file, which a restart replaces by one with fewer."""

    def __init__(self, path: Path) -> None:
        self._path, self._file, self._read = path, -1, 0

    def new(self) -> list[int]:
        """The steps of the rows that have come since the last call."""
        try:
            with open(self._path, "rb") as opened:
                if (inode := os.fstat(opened.fileno()).st_ino) != self._file:
                    kept = self._read if self._file != -1 else 0  # the same rows, but for the last ones
                    self._file, self._read = inode, min(kept, os.fstat(opened.fileno()).st_size)
                opened.seek(self._read)
                content = opened.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        found = [json.loads(line) for line in whole.splitlines()]
        return [row["step"] for row in found if "samples_hash" in row]


def ranks_of(launcher: int) -> dict[int, int]:
    """Process by rank, of those that a server forks below this process."""
    found: dict[int, int] = {}
    below = [launcher]
    while below:
        process = Path("/proc", str(below.pop()))
        try:
            name = (process / "comm").read_text().split()
            children = (process / "task" / process.name / "children").read_text().split()
        except OSError:  # it has ended
            continue
        if name[:2] == ["fastvit", "rank"]:
            found[int(name[2])] = int(process.name)
        else:  # what a rank forks is no rank
            below += map(int, children)
    return found


# ---- what it means


def judged(calm: Followed, disturbed: Followed, starts: Sequence[int]) -> dict[str, Any]:
    """The figures. starts: the steps that the disturbed run started from, the first start included."""
    rows, usual = disturbed.rows, median(gaps(disturbed.rows))
    useful = useful_seconds(rows, disturbed.kills)
    wall, in_peace = rows[-1].at - rows[0].at, calm.rows[-1].at - calm.rows[0].at
    kills = []
    for kill, start in zip(disturbed.kills, starts[1:], strict=False):
        first_new = next((row.at for row in rows if row.at > kill.at and row.step > kill.step), None)
        kills.append(
            {
                **kill._asdict(),
                "resumed_at": start,
                "steps_lost": max(0, kill.step - start),
                "seconds_to_new_step": None if first_new is None else first_new - kill.at,
            }
        )
    return {
        "steps": rows[-1].step,
        "step_seconds": usual,
        "step_seconds_in_peace": median(gaps(calm.rows)),
        "seconds": wall,
        "seconds_in_peace": in_peace,
        "useful_seconds": useful,
        "goodput": useful / wall,
        "kills": kills,
        "timeline": [list(row) for row in rows],
    }


def gaps(rows: Sequence[Seen]) -> list[float]:
    """Seconds of each step whose row follows that of the step before."""
    return [row.at - before.at for before, row in zip(rows, rows[1:], strict=False) if row.step == before.step + 1]


def useful_seconds(rows: Sequence[Seen], kills: Sequence[Kill]) -> float:
    """Of all steps after the first row's: each as it was done last, the first after a kill as the median step."""
    usual, seconds = median(gaps(rows)), dict[int, float]()
    for before, row in zip(rows, rows[1:], strict=False):
        is_first = row.step != before.step + 1 or any(before.at <= kill.at < row.at for kill in kills)
        seconds[row.step] = usual if is_first else row.at - before.at
    return sum(seconds[step] for step in seconds if step != rows[0].step)


def record_of(run: RunFolder) -> list[dict[str, Any]]:
    """All rows, without what the machine's speed enters."""
    found = read_all_metrics(run.metrics)
    rows = [*found.train, *found.evaluations, *found.few_shot, *found.own, *found.losses]
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def weights_of(run: RunFolder) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(run.path.glob("*.safetensors"))}


def events_of(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.events.read_text().splitlines()]


def start_step(event: Mapping[str, Any]) -> int:
    return int(event["step"])


# ---- report


def report(record: Mapping[str, Any]) -> str:
    """As Markdown."""
    environment, kills = record["environment"], record["kills"]
    waits = [kill["seconds_to_new_step"] for kill in kills if kill["seconds_to_new_step"] is not None]
    lost = [kill["steps_lost"] for kill in kills]
    rows = [
        f"| {kill['at']:.0f} | {kill['rank']} | {kill['step']} | {kill['resumed_at']} | {kill['steps_lost']} | "
        f"{'-' if kill['seconds_to_new_step'] is None else format(kill['seconds_to_new_step'], '.2f')} |"
        for kill in kills
    ]
    same = {True: "equal to the bit", False: "**different**"}
    lines = [
        "# Faults",
        "",
        f"`{record['recipe']}` on {environment['cpu']}, {record['processes']} processes, "
        f"{environment['started'][:10]}; load average {record['load_average']:.1f}. A SIGKILL of a random rank every "
        f"{record['kill_every']:g} s, {len(kills)} in all.",
        "",
        "| | |",
        "|---|---:|",
        f"| goodput | {record['goodput']:.1%} |",
        f"| steps | {record['steps']} of {record['step_seconds']:.3f} s |",
        f"| the same steps in peace, without copies | {record['seconds_in_peace']:.0f} s, one "
        f"{record['step_seconds_in_peace']:.3f} s |",
        f"| with the kills | {record['seconds']:.0f} s |",
        f"| seconds from a kill to the first new step | {_spread(waits)} |",
        f"| steps done again after a kill | at most {max(lost, default=0)} |",
        f"| record of the two runs | {same[record['record_equal']]} |",
        f"| weights of the two runs | {same[record['weights_equal']]} |",
        "",
        "| killed at, s | rank | steps done | resumed at | done again | new step after, s |",
        "|---:|---:|---:|---:|---:|---:|",
        *rows,
        "",
    ]
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "-"


def draw(record: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """`NAME-timeline`: steps over time, with the kills."""
    return save(f"{name}-timeline", partial(_figure, record), folder)


def _figure(record: Mapping[str, Any], theme: Theme) -> Any:
    figure = canvas((9.6, 3.4))
    about = f"a SIGKILL every {record['kill_every']:g} s; goodput {record['goodput']:.1%}"
    title_of(figure, f"Steps of {record['recipe']} over time", about, theme)
    steps, gap = figure.subplots(1, 2, width_ratios=(2, 1))
    at, done = zip(*record["timeline"], strict=True)
    steps.plot(at, done, color=theme.series[0], linewidth=1.4)
    for kill in record["kills"]:
        steps.axvline(kill["at"], color=theme.series[1], linewidth=0.8)
    steps.set_xlabel("seconds")
    steps.set_ylabel("steps done")
    waits = [kill["seconds_to_new_step"] or 0 for kill in record["kills"]]
    gap.bar(range(1, len(waits) + 1), waits, color=theme.series[1])
    gap.set_xlabel("kill")
    gap.set_ylabel("seconds to the first new step")
    for axis in (steps, gap):
        axis.grid(axis="y", color=theme.line, linewidth=0.7)
        axis.set_axisbelow(True)
    return figure
