"""torchrun that respects the exit codes of its processes; it takes torchrun's arguments.

Plain torchrun restarts its processes after any exit code, and itself always exits with 1. This agent does not restart
after bad input (2), nor a run that was asked to stop (76) unless the job is elastic: then another node has to leave.
Its exit code is that of the processes: 2 before 76 before 75, "run the same command again", which covers all other
failures. It also holds the memory for copies of the state, which outlives its processes (checkpoint.in_memory).
"""

import logging
import os
import sys
import tempfile
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import run
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend
from torch.distributed.launcher import api

from fastvit_engine.checkpoint.in_memory.holder import Holder, can_hold, held_copies
from fastvit_engine.distributed.environment import ERROR_SHOWN
from fastvit_engine.distributed.store import JobStore
from fastvit_engine.distributed.supervise import cluster_exit_code
from fastvit_engine.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, EXIT_RESTART


class Agent(LocalElasticAgent):
    """Torchrun's agent of one node, which tells failures that a restart may fix from others."""

    final_codes = {EXIT_BAD_INPUT, EXIT_PREEMPTED}
    folder = ""  # that tells the ranks of this node, in each attempt, whether one of them has said why it ends
    attempts = 0
    holder: Holder | None = None  # of the copies of this node and of those of the node before it
    resumed: int | None = None  # the step that the last attempt may have continued from
    causes: set[int] = set()  # with which processes failed, before the agent ended the others for it
    last_codes: set[int] = set()

    def _monitor_workers(self, worker_group: Any) -> Any:
        failed = exit_codes(self._pcontext) - {0}
        result = super()._monitor_workers(worker_group)
        if result.failures:  # also of those that the agent has ended by now: they may say 76, "stopped on request"
            self.causes = failed or {failure.exitcode for failure in result.failures.values()}
            if self.final_codes & self.causes:
                self._remaining_restarts = 0
        return result

    def _start_workers(self, worker_group: Any) -> Any:
        """All nodes and restarts of this job have one run id, which they agree on where they meet.

        One that is set already stays: of a job whose agents are started again, too, with another meeting point.
        """
        wanted = os.environ.get("FASTVIT_RUN_ID") or uuid.uuid4().hex
        rendezvous = getattr(worker_group.store, "underlying_store", worker_group.store)
        self.attempts += 1
        os.environ[ERROR_SHOWN] = str(Path(self.folder) / f"shown-{self.attempts}")
        if self.holder is not None:
            newest = self.holder.newest_step
            if newest is not None and newest == self.resumed:
                self.holder.forget()  # an older state may be better
                print(f"launch: no step since step {newest}: the copies in memory are dropped", file=sys.stderr)
            self.resumed = newest
        os.environ["FASTVIT_RUN_ID"] = rendezvous.compare_set("fastvit_run_id", "", wanted).decode()
        return super()._start_workers(worker_group)

    @property
    def has_spoken(self) -> bool:
        """Whether a rank of this node has said why it ends."""
        return Path(os.environ.get(ERROR_SHOWN, "/nowhere")).exists()

    def _shutdown(self, *args: Any, **kwargs: Any) -> None:
        super()._shutdown(*args, **kwargs)
        self.last_codes = exit_codes(self._pcontext)


def _tells_of_a_fault(record: logging.LogRecord) -> bool:
    """Not what torchrun logs of ranks that end because of bad input, or on request: they have said so in a sentence."""
    text = record.getMessage()
    ends = f"failed (exitcode: {EXIT_BAD_INPUT})", f"failed (exitcode: {EXIT_PREEMPTED})"
    return not text.startswith(("Sending process", *ends))


def exit_codes(processes: Any) -> set[int]:
    handlers = getattr(processes, "subprocess_handlers", {})
    codes = {handler.proc.poll() for handler in handlers.values()}
    return codes - {None}


def main() -> int:
    arguments = run.parse_args(sys.argv[1:])
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fastvit-"))
        holder = None
        if can_hold():  # memory is taken only by copies, of which this agent need not know
            try:
                processes = run.determine_local_world_size(arguments.nproc_per_node)
            except ValueError as error:
                print(f"launch: error: {error}", file=sys.stderr)
                return EXIT_BAD_INPUT
            holder = stack.enter_context(held_copies(processes, guests=True))
            os.environ.update(holder.environment_of_node)
        return run_node(arguments, folder, holder)


def run_node(arguments: Any, folder: str, holder: Holder | None = None) -> int:
    """Runs the processes of this node; returns its exit code. folder: for notes of the processes."""
    agents: list[Agent] = []
    fewest, most = run.parse_min_max_nnodes(arguments.nnodes)

    def make_agent(*args: Any, **kwargs: Any) -> Agent:
        agents.append(Agent(*args, **kwargs))
        agents[-1].folder, agents[-1].holder = folder, holder
        if fewest < most:
            agents[-1].final_codes = {EXIT_BAD_INPUT}
        return agents[-1]

    if "--verbose" not in arguments.training_script_args:
        logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(_tells_of_a_fault)
    # Where torchrun looks for them.
    c10d_rendezvous_backend.TCPStore = dist.TCPStore = JobStore  # type: ignore[misc, assignment]
    api.LocalElasticAgent = make_agent  # type: ignore[misc, assignment]
    try:
        run.run(arguments)
    except ChildFailedError:
        codes = agents[-1].causes
        if EXIT_BAD_INPUT not in codes:
            print(f"launch: processes of this node ended with {sorted(codes)}", file=sys.stderr)
        elif not agents[-1].has_spoken:
            print("launch: ended because of bad input: another node says which", file=sys.stderr)
        return cluster_exit_code(codes)
    except SignalException as error:
        codes = agents[-1].last_codes if agents else set()
        ended = f"processes ended with {sorted(codes)}"
        print(f"launch: stopped on request by {error.sigval.name}; {ended}", file=sys.stderr)
        return EXIT_PREEMPTED if codes and codes <= {0, EXIT_PREEMPTED} else cluster_exit_code(codes)
    except Exception as error:  # of the rendezvous, in many types: its head node is gone, or never was there
        print(f"launch: error: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_INPUT if isinstance(error, ValueError) else EXIT_RESTART
    return 0


if __name__ == "__main__":
    sys.exit(main())
