"""Going back to the last checkpoint: what is decided, and where it is written down.

The decision is in `recovery.json` before the run continues, and in the manifests of its later checkpoints; the events
tell people about it.
"""

from dataclasses import replace
from typing import NamedTuple

from fastvit_engine.checkpoint import CheckpointStore, Recovery
from fastvit_engine.data.stream.skip import Window
from fastvit_engine.errors import UserError
from fastvit_engine.observe.events import record_event
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.observe.units import counted
from fastvit_engine.train.health.diagnosis import Diagnosis
from fastvit_engine.train.health.guard import Anomaly, StepReport
from fastvit_engine.train.recovery import save_recovery
from fastvit_engine.train.start import Start, move_to_latest


class Failure(NamedTuple):
    """A step that training must not continue from."""

    step: int  # steps done before it
    window: Window  # positions of its samples in the data order
    anomaly: Anomaly
    report: StepReport


def record_anomaly(run: RunFolder, failure: Failure, diagnosis: Diagnosis) -> str:
    """Writes the event down with all its facts, and returns its sentence."""
    anomaly, report = failure.anomaly, failure.report
    message = f"at step {failure.step + 1}{diagnosis.at}, {anomaly.message}: {diagnosis.cause}"
    record_event(
        run,
        "anomaly",
        message,
        step=failure.step,
        kind=anomaly.kind,
        samples=list(failure.window),
        loss=_number(report.loss),
        grad_norm=_number(report.grad_norm),
        limit=anomaly.limit,
        ranks=diagnosis.ranks,
        hosts=diagnosis.hosts,
        keys=diagnosis.keys,
        parameters=diagnosis.parameters,
        repeats=diagnosis.repeats,
        cause=diagnosis.cause,
    )
    return message


def go_back(
    run: RunFolder,
    store: CheckpointStore,
    start: Start,
    failure: Failure,
    message: str,
    diagnosis: Diagnosis,
    *,
    max_rewinds: int,
) -> Start:
    """Where the run continues after a failure: its last checkpoint, without the window of the failed step.

    If the weights are at fault, the window is not skipped. Writes the decision down first. Raises UserError if going
    back would not help: the run has gone back `max_rewinds` times already, this window failed before and was not
    skipped, or every sample fails before the first update.
    """
    skip = not diagnosis.in_weights
    before, window, step = start.state.recovery, failure.window, failure.step
    after = before.merge(Recovery(failed=(window,)))
    problem = _why_not(run, before, failure, message, diagnosis, max_rewinds)
    if problem is None:
        skipped = Recovery(skipped=(window,) if skip else ())
        after = replace(after.merge(skipped), rewinds=before.rewinds + 1)
    save_recovery(run, after)
    if problem is not None:
        raise UserError(problem)
    if skip:
        first, last = window
        left_out = f"samples {first:,} to {last - 1:,} of the run's order are left out"
        record_event(run, "skip", left_out, step=step, samples=[first, last])
    there = move_to_latest(start, store, after)
    record_event(
        run,
        "rewind",
        f"back from step {step} to the checkpoint of step {there.step}, {after.rewinds} of at most {max_rewinds} times",
        step=step,
        from_step=step,
        to_step=there.step,
        rewinds=after.rewinds,
    )
    return there


def _why_not(
    run: RunFolder, recovery: Recovery, failure: Failure, message: str, diagnosis: Diagnosis, max_rewinds: int
) -> str | None:
    """Why the run must not go back once more, in a sentence; None if it may."""
    remedy, events = diagnosis.remedy(updated=failure.step > 0), run.describe(run.events)
    if diagnosis.everywhere and failure.step == 0:
        return (
            f"{message}; no update has been made, so the configuration is at fault: {remedy}, and start again in "
            "another run folder with --out"
        )
    if recovery.rewinds >= max_rewinds:
        return (
            f"{message}; the run has gone back {counted(recovery.rewinds, 'time')}, and health.max_rewinds = "
            f"{max_rewinds} allows no more: see {events}, {remedy}, and run the same command again with --resume "
            "auto and a higher health.max_rewinds"
        )
    if failure.window in recovery.failed and diagnosis.in_weights:
        return (
            f"{message}; the same step has failed before, from the same checkpoint: see {events}, {remedy}, and "
            "run the same command again with --resume auto"
        )
    return None


def _number(value: float) -> float | str:
    """As `metrics.jsonl` has it: JSON knows no NaN and no infinity."""
    return value if abs(value) < float("inf") else str(value)
