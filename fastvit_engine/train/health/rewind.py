"""Going back to the last checkpoint, and what a run remembers of it.

The memory is `events.jsonl`: a line is on disk before the run goes on, and none is ever removed. So a run that is
killed between going back and its next checkpoint still leaves out the same samples, and counts its rewinds on. A
window can also be left out by hand, with a line of one's own:
`record_event(RunFolder(out), "skip", "why", samples=[64, 128])`.
"""

from typing import Any, cast

from fastvit_engine.checkpoint import Place
from fastvit_engine.data.stream.skip import Window
from fastvit_engine.errors import UserError
from fastvit_engine.observe.events import read_events, record_event
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.train.health.diagnosis import Diagnosis
from fastvit_engine.train.health.guard import Anomaly, StepReport
from fastvit_engine.train.start import Start, move_to_latest


def record_anomaly(
    run: RunFolder, step: int, window: Window, anomaly: Anomaly, report: StepReport, diagnosis: Diagnosis
) -> str:
    """Writes the event down with all its facts, and returns its sentence. `step`: steps done before the failed one."""
    message = f"at step {step + 1}{diagnosis.at}, {anomaly.message}: {diagnosis.cause}"
    record_event(
        run,
        "anomaly",
        message,
        step=step,
        kind=anomaly.kind,
        samples=list(window),
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
    run: RunFolder, place: Place, start: Start, step: int, window: Window, anomaly: str, *, skip: bool, most: int
) -> Start:
    """Where the run goes on after an anomaly at `step`: its last checkpoint, without the window if `skip`.

    Writes both decisions down. UserError where the run has gone back `most` times already, or where this window failed
    before without being skipped, so that going back once more would not help.
    """
    events = cast(list[dict[str, Any]], read_events(run))
    rewinds = sum(event["event"] == "rewind" for event in events)
    if rewinds >= most:
        raise UserError(
            f"{anomaly}; the run has gone back {rewinds} time(s), and health.max_rewinds = {most} allows no more: see "
            f"{run.events}, remove the cause (a host to leave out, shards to repair, a lower optimizer.learning_rate) "
            "and run the same command again with a higher health.max_rewinds"
        )
    failures = sum(event["event"] == "anomaly" and event["samples"] == list(window) for event in events)
    if failures > 1 and not skip:
        raise UserError(
            f"{anomaly}; the same step has failed before, from the same checkpoint: leave out the hosts that "
            f"{run.events} names, or lower optimizer.learning_rate, and run the same command again"
        )
    if skip:
        first, last = window
        message = f"samples {first:,} to {last - 1:,} of the run's order are left out"
        record_event(run, "skip", message, step=step, samples=[first, last])
    there = move_to_latest(start, run, place)
    record_event(
        run,
        "rewind",
        f"back from step {step} to the checkpoint of step {there.step}, {rewinds + 1} of at most {most} times",
        step=step,
        from_step=step,
        to_step=there.step,
        rewinds=rewinds + 1,
    )
    return there


def _number(value: float) -> float | str:
    """As `metrics.jsonl` has it: JSON knows no NaN and no infinity."""
    return value if abs(value) < float("inf") else str(value)
