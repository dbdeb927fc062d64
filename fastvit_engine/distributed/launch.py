"""Runs `fastvit` on all GPUs of this machine, and restarts it from its latest checkpoint when it fails."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence

from fastvit_engine.distributed.fast_restart import FastRestart
from fastvit_engine.distributed.supervise import LaunchOutcome, Requests, gpu_count, start_ranks, wait_for_ranks
from fastvit_engine.errors import EXIT_RESTART
from fastvit_engine.observe.disk import insist
from fastvit_engine.observe.events import record_event
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.shown import say


def processes_here(cpu_processes: int) -> int:
    """One process per GPU; without a GPU, `cpu_processes`."""
    return gpu_count() or cpu_processes


def run_with_restarts(
    arguments: Sequence[str],
    processes: int,
    run: RunFolder,
    max_restarts: int,
    environment: Mapping[str, str] = os.environ,
    check_owner: Callable[[], None] = lambda: None,
    progress: Callable[[], object] = lambda: None,
    fast: FastRestart | None = None,
) -> int:
    """Runs `python -m fastvit_engine ARGUMENTS` once per rank, and restarts it with `--resume auto` if it fails.

    It restarts after a failure that a restart may cure, at most `max_restarts` times without a new checkpoint between.
    `environment` is that of each rank; `check_owner` raises UserError if the run must not be started again.
    `progress` returns something else once there is a new checkpoint; OSError if the disk or the store cannot say.
    `fast`: how ranks are started, if not by a new interpreter each.

    SIGTERM, SIGUSR1, SIGHUP, SIGINT and SIGQUIT are passed on to the ranks. Returns the exit code for the command.
    """
    # From the latest checkpoint of this run, or from the start if it has none yet. The last --resume counts.
    command, resuming = list(arguments), [*arguments, "--resume", "auto"]
    requests = Requests()
    with requests.passed_on():
        restarts, newest = 0, _progress_or(progress, None)
        while True:
            outcome = run_processes(command, processes, requests, environment, fast)
            if not outcome.restartable:
                return outcome.exit_code
            if requests.first:
                say(f"fastvit: stopped on request, and not all was saved: {outcome.cause}", file=sys.stderr)
                return EXIT_RESTART
            if (now := _progress_or(progress, newest)) != newest:
                restarts, newest = 0, now
            if restarts == max_restarts:
                tried = f" after {restarts} restarts without a new checkpoint" if restarts else ""
                say(f"fastvit: giving up{tried}: {outcome.cause}", file=sys.stderr)
                return outcome.exit_code
            if restarts and fast is not None:
                fast.forget_copies()  # training ended twice where they end: an older state may be better
            insist(check_owner, f"the owner record of run folder {run}")
            restarts += 1
            message = f"starting again ({restarts} of {max_restarts}): {outcome.cause}"
            record_event(run, "restart", message, attempt=restarts)
            say(f"fastvit: {message}", file=sys.stderr)
            command = resuming


def run_processes(
    arguments: Sequence[str],
    processes: int,
    requests: Requests | None = None,
    environment: Mapping[str, str] = os.environ,
    fast: FastRestart | None = None,
) -> LaunchOutcome:
    """Runs `python -m fastvit_engine ARGUMENTS` once per rank and waits; the first that fails ends the others."""
    command = [sys.executable, "-m", "fastvit_engine", *arguments] if fast is None else fast.starting(arguments)
    with start_ranks(command, processes, environment) as children:
        return wait_for_ranks(children, requests or Requests(), None if fast is None else fast.grace_after_kill)


def _progress_or(progress: Callable[[], object], before: object) -> object:
    """What `progress` returns; `before` if the disk or the store cannot say."""
    try:
        return progress()
    except OSError:
        return before
