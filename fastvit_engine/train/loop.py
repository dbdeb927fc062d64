"""The training loop. Every process of the run executes `train` from top to bottom."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial

from fastvit_engine.checkpoint import Checkpoint, TrainerState
from fastvit_engine.checkpoint.export import export_run
from fastvit_engine.checkpoint.in_memory import HeldCopies, MemoryStore, Messages, held_here
from fastvit_engine.checkpoint.owner import Ownership, own
from fastvit_engine.checkpoint.records import Records, kept_records
from fastvit_engine.config import Config, Resolved
from fastvit_engine.data import Batch, IterableData
from fastvit_engine.data.stream.batch import leaves_compressed
from fastvit_engine.data.stream.gpu_decode import decoded_on, nvjpeg
from fastvit_engine.data.stream.skip import Window, step_start
from fastvit_engine.distributed.preemption import Preemption
from fastvit_engine.distributed.watchdog import Watchdog
from fastvit_engine.distributed.world import World, join_world
from fastvit_engine.errors import Preempted, UserError
from fastvit_engine.evaluate.own import Measure
from fastvit_engine.objectives import Objective, ObjectiveFactory, Taught, build_objective, find_objective
from fastvit_engine.objectives.build import OBJECTIVES
from fastvit_engine.observe.events import record_event
from fastvit_engine.observe.recorder import Recorder
from fastvit_engine.observe.run_folder import RunFolder, cache_folder
from fastvit_engine.observe.startup import StartUp
from fastvit_engine.observe.units import counted, format_share
from fastvit_engine.shown import say
from fastvit_engine.sizing.defaults import Chosen, choose
from fastvit_engine.sizing.machine import machine_of
from fastvit_engine.train.evaluators import build_evaluators, run_evaluators
from fastvit_engine.train.first_weights import describe_weights, fill_in, load_first_weights
from fastvit_engine.train.health.diagnosis import Trace, diagnose
from fastvit_engine.train.health.fp8 import Fp8Fallback
from fastvit_engine.train.health.guard import StepReport
from fastvit_engine.train.health.replicas import check_first_weights
from fastvit_engine.train.health.rewind import Failure, go_back, record_anomaly
from fastvit_engine.train.job import Job, build_job
from fastvit_engine.train.observers import Observers, observed
from fastvit_engine.train.profiler import StepProfiler
from fastvit_engine.train.recovery import save_recovery
from fastvit_engine.train.restarts import check_room
from fastvit_engine.train.run_record import record_start
from fastvit_engine.train.schedule import Schedule
from fastvit_engine.train.start import Start, load_start, preflight, record_batch_change, report_damage
from fastvit_engine.train.step import take_step
from fastvit_engine.train.step_log import StepLog
from fastvit_engine.train.teacher import begin_teaching
from fastvit_engine.train.trial.settle import settle_micro_batch
from fastvit_engine.train.trial.step import StepTrial
from fastvit_engine.trusted_folders import trust_compiled_code


def train(
    resolved: Resolved,
    run: RunFolder,
    *,
    resume: bool,
    data: IterableData | None = None,
    allow_batch_change: bool = False,
    make_objective: ObjectiveFactory | None = None,
    evaluators: Mapping[str, Measure] | None = None,
) -> None:
    """Trains the model of a configuration into a run folder, on `data` if given and else on `data.train`.

    With `resume`, continues from the folder's latest checkpoint, if any; without, refuses a folder that holds a run.
    With `allow_batch_change`, `train.global_batch_size` may differ from the checkpoint's.
    make_objective: builds what `train.objective` names, which is imported otherwise. evaluators: see `evaluate.own`.
    """
    trust_compiled_code()
    held_areas = held_here(resolved.config.checkpoint.in_memory)
    if resolved.config.checkpoint.in_memory is True and not held_areas.own:
        raise UserError(
            "checkpoint.in_memory = true needs a launcher that outlives its processes and keeps their copies, as "
            "`fastvit train` on one machine and launch/torchrun on several: let one of them start the processes, or "
            "set checkpoint.in_memory=auto"
        )
    make_objective = make_objective or find_objective(resolved.config.train.objective)
    run.prepare()
    limits = resolved.config.watchdog
    timeout_seconds = limits.slow_phase_seconds + limits.timeout_seconds
    with (
        StartUp("joining the other processes") as startup,
        Preemption() as preemption,
        join_world(timeout_seconds, run.stacks) as world,
        Watchdog(run, world, limits) as watchdog,
        _owned(resolved.config, run, world) as (owner, records),
        observed(resolved.config.observe, run, world) as observers,
    ):
        preemption.on_stack_request = watchdog.request_stacks
        watchdog.on_phase, watchdog.on_step = partial(_show_phase, startup, world), startup.done
        startup.phase("checking the data and the run folder")
        given = resolved
        filled = world.on_main(lambda: fill_in(given, run, resume=resume))
        resolved = filled.apply(given)
        chosen = choose(resolved.config, machine_of(world))
        objective = build_objective(chosen.config, world.device, make_objective)
        held = HeldCopies(held_areas, world, partial(Messages.open, timeout_seconds))
        in_memory = held.newest()
        check = partial(preflight, chosen.config, run, world.size, resume=resume, data=data, in_memory=in_memory)
        check_room(chosen.config, held)
        start = world.on_main(lambda: check(allow_batch_change=allow_batch_change))
        if start.checkpoint is not None and isinstance(start.checkpoint.store, MemoryStore):
            start = replace(start, checkpoint=in_memory)  # as this process finds it
        if start.checkpoint is None and resolved.config.init.from_ is not None:
            settings = resolved.config.init
            start = start.beginning_with(world.on_main(lambda: describe_weights(settings)), filled.notes)
        startup.pause()
        if world.is_main:
            report_damage(run, start.damaged, start.checkpoint)
            warnings = (*start.warnings, *filled.doubts(start.data.class_names))
            say("\n".join([start.message, *(f"warning: {text}" for text in warnings)]))
        resolved, chosen = start.settle(resolved, chosen)
        if start.step < start.total_steps:
            if chosen.config.train.micro_batch_trial:
                startup.phase("trying micro-batches")
                chosen = _with_tried_micro_batch(chosen, run, start, world, watchdog, make_objective)
            if world.is_main:
                say(chosen.describe())
            startup.phase("building the model and its engine")
            measured = evaluators or {}
            _train(
                resolved,
                chosen,
                run,
                start,
                world,
                watchdog,
                preemption,
                owner,
                records,
                held,
                observers,
                objective,
                measured,
                data,
            )
        elif finished := start.checkpoint:
            world.on_main(lambda: export_run(finished, run))
            world.on_main(records.insist)


def _with_tried_micro_batch(
    chosen: Chosen, run: RunFolder, start: Start, world: World, watchdog: Watchdog, make_objective: ObjectiveFactory
) -> Chosen:
    """With the largest micro-batch that fits; collective."""
    phases = Schedule(chosen.config, start.data.samples_per_epoch, start.state.batches).phases.phases
    most_tokens = max(phases, key=lambda phase: phase.image_size**2 * (1 - phase.patch_drop))
    trial = StepTrial(chosen.config, chosen.machine, world, make_objective, most_tokens)

    def peak_of(micro_batch_size: int) -> int | None:
        watchdog.phase(f"trying a micro-batch of {micro_batch_size}", slow=True)
        return trial.peak_of(micro_batch_size)

    folder, continues = cache_folder() / "micro_batches", start.checkpoint is not None
    own_objective = make_objective not in OBJECTIVES.values()
    chosen, message = settle_micro_batch(
        chosen, run, world, folder, peak_of, trial.limit(), own_objective=own_objective, continues=continues
    )
    if message and world.is_main:
        say(message)
    return chosen


_SHOWN_PHASES = {
    "loading": "loading the weights",
    "saving": "saving the first checkpoint",
    "waiting for data": "waiting for the first batch",
    "forward": "first forward pass",
    "backward": "first backward pass",
    "optimizer step": "first optimizer step",
}


def _show_phase(startup: StartUp, world: World, name: str) -> None:
    compiles = name in ("forward", "backward") and world.device.type == "cuda"
    startup.phase(_SHOWN_PHASES.get(name, name) + (", which compiles kernels" if compiles else ""))


@contextmanager
def _owned(config: Config, run: RunFolder, world: World) -> Iterator[tuple[Ownership, Records]]:
    """Owns the run and keeps its records during the block, on rank 0. Collective, also in its errors."""
    with ExitStack() as owned:
        owners, records = [Ownership()], [Records(run)]

        def take() -> None:
            owners.append(owned.enter_context(own(config.checkpoint, run)))
            records.append(owned.enter_context(kept_records(run, owners[-1])))

        world.on_main(take)
        yield owners[-1], records[-1]


def _train(
    resolved: Resolved,
    chosen: Chosen,
    run: RunFolder,
    start: Start,
    world: World,
    watchdog: Watchdog,
    preemption: Preemption,
    owner: Ownership,
    records: Records,
    held: HeldCopies,
    observers: Observers,
    objective: Objective,
    evaluators: Mapping[str, Measure],
    data: IterableData | None = None,
) -> None:
    schedule = Schedule(chosen.config, start.data.samples_per_epoch, start.state.batches)
    job = build_job(
        chosen.config, run, world, schedule, watchdog, preemption, owner, records, held, objective, evaluators
    )
    if job.fp8 is not None and world.is_main:
        say(job.fp8.layers.describe())
    try:
        start = _load(start, job)
        world.on_main(lambda: _record(resolved, chosen, job, start))
        while (earlier := _train_from(start, job, observers, data)) is not None:
            start = _load(earlier, job)
    finally:
        job.engine.close()


def _record(resolved: Resolved, chosen: Chosen, job: Job, start: Start) -> None:
    """Writes down that the run starts, and how."""
    job.owner.confirm()
    save_recovery(job.run, start.state.recovery)
    record_start(resolved, chosen, job, start.step, start.state.init)
    record_batch_change(job.run, start)
    job.records.insist()


def _load(start: Start, job: Job) -> Start:
    """Loads the weights of the checkpoint, or the first; returns where training starts, maybe an older checkpoint."""
    job.processes.watchdog.phase("loading", slow=True)
    start = load_start(start, job.checkpointer, job.run, job.world)
    if start.checkpoint is None:
        load_first_weights(job)
    job.copies.continue_from(start.checkpoint)
    return start


def _train_from(start: Start, job: Job, observers: Observers, data: IterableData | None) -> Start | None:
    """Trains to the end of the run and returns None; or, after a failure, returns where to continue instead."""
    # the data, from the first sample that is still to come
    start = replace(start, data=start.data.bind(data))  # an iterable stays in its process
    if start.state.batches != job.schedule.batch_sizes:  # it is an older checkpoint, from before the batch changed
        job = replace(job, schedule=Schedule(job.config, start.data.samples_per_epoch, start.state.batches))
    job.health.guard.forget(start.state.recent)
    if job.fp8 is not None:
        job.fp8.restore(start.state.fp8)
    begin_teaching(job)
    log = StepLog(job, start.state, observers, job.copies.unsettled)
    with (
        closing(log),
        closing(StepProfiler(job, log.stopwatch)) as profiler,
        closing(log.watch(_open_batches(start, job))) as batches,  # which ends the data workers
    ):
        return _train_steps(start, job, batches, log, profiler)


def _train_steps(
    start: Start, job: Job, batches: Iterator[Batch], log: StepLog, profiler: StepProfiler
) -> Start | None:
    """The steps from `start` on; returns as `_train_from` does."""
    config, schedule, guard, watchdog = job.config, job.schedule, job.health.guard, job.processes.watchdog
    state = start.state
    evaluators = build_evaluators(job, start.data, start.few_shot, log.recorder)
    if log.recorder:
        job.checkpointer.say = log.recorder.message
    if start.checkpoint is None:
        check_first_weights(job.engine, job.world)
        _save(job, state, log)  # to have something to go back to
    elif start.saves_first:
        _save(job, state, log)
    watchdog.begin(state.step)

    for step in range(state.step, schedule.total_steps):
        # ---- one optimizer step on one global batch
        done, window = step + 1, _next_window(state, config)
        learning_rate = schedule.learning_rate(step)
        job.engine.set_learning_rate(learning_rate)
        guard.flag = float(job.processes.preemption.signal is not None)
        with profiler.step(done):
            trace, report = take_step(job, step, batches)
        if report.anomaly:
            return _recover(job, start, Failure(step, window, report.anomaly, report), trace, log.recorder)
        state = replace(state, step=done, consumed=window[1])
        if job.ema is not None:
            job.ema.update(step)
        if isinstance(job.objective, Taught):
            job.objective.step_done(job.engine.model)
        if job.fp8 is not None:
            _leave_fp8(job.fp8, report, job, done, log.recorder)
        watchdog.step_done(done)
        log.step_done(done, trace)

        # ---- report
        leaves = report.flags > 0 and done < schedule.total_steps  # any of the processes was asked to
        saves = leaves or schedule.is_due(schedule.save_every, done)
        if saves or log.is_due(done):
            watchdog.phase("reporting")
            log.write(done, learning_rate, report, trace)
            job.checkpointer.settle()

        # ---- evaluate
        if due := [evaluator for evaluator in evaluators if schedule.is_due(evaluator.every_steps, done)]:
            with log.stopwatch.paused():
                figures = run_evaluators(due, job, done, log.recorder)
            if figures:
                state = replace(state, accuracy=figures, evaluated_at=done)

        # ---- save, but never weights that are broken
        if saves:
            if anomaly := job.health.replicas.compare():
                return _recover(job, start, Failure(step, window, anomaly, report), trace, log.recorder)
            _save(job, state, log)

        # ---- leave, if asked to
        if leaves:
            _leave(job, done, log)

        # ---- copy the state to memory that outlives this process; what has been written of it up to here belongs to it
        # Of a step that saves, too: its checkpoint is complete only some steps later.
        if done < schedule.total_steps:
            job.copies.after_step(done, partial(_state_now, job, state, log), log.unsettled)

    _finish(job, state, log)
    return None


def _open_batches(start: Start, job: Job) -> Iterator[Batch]:
    """Endless micro-batches of this process, from the state of the run on."""
    world = job.world
    batches = start.data.train_batches(
        job.config,
        rank=world.rank,
        world_size=world.size,
        micro_batch_size=job.split.micro_batch_size,
        consumed=start.state.consumed,
        pin_memory=world.device.type == "cuda",
        node_ranks=world.node_ranks if world.rank == world.node_ranks[0] else (),
        skipped=start.state.recovery.skipped,
        image_size_of=job.schedule.phases.image_sizes_from(start.state.step),
    )
    return decoded_on(batches, world.device, nvjpeg(world.device)) if leaves_compressed(job.config) else batches


def _next_window(state: TrainerState, config: Config) -> Window:
    """The positions of the next step's samples in the data order."""
    batch = config.train.global_batch_size
    first = step_start(state.consumed, batch, state.recovery.skipped)
    return first, first + batch


def _leave_fp8(fallback: Fp8Fallback, report: StepReport, job: Job, step: int, recorder: Recorder | None) -> None:
    """Returns layers to bf16 whose scales have been out of range for long; rank 0 says so."""
    leaving = fallback.step_done(report.counts)
    if leaving and recorder:
        message = fallback.describe(leaving, step)
        recorder.message(message)
        record_event(job.run, "fp8_fallback", message, step=step, layers=list(leaving))


def _save(job: Job, state: TrainerState, log: StepLog) -> None:
    """Begins a save, whose copy to host memory the next update waits for; a later `settle` tells how it ended."""
    job.processes.watchdog.phase("saving", slow=True)
    with log.stopwatch.paused():
        job.checkpointer.save(_state_now(job, state, log))


def _state_now(job: Job, state: TrainerState, log: StepLog) -> TrainerState:
    """With what is counted elsewhere."""
    recent, bad = tuple(job.health.guard.recent), log.bad_samples.bad
    in_fp8 = state.fp8 if job.fp8 is None else job.fp8.state
    seconds, flops = log.stopwatch.so_far, log.flops
    return replace(state, seconds=seconds, flops=flops, recent=recent, bad_samples=bad, fp8=in_fp8)


def _recover(job: Job, start: Start, failure: Failure, trace: Trace, recorder: Recorder | None) -> Start:
    """Finds out what is wrong, writes it down, and returns the point that the run goes back to.

    The samples of the step are left out from then on, unless the weights were at fault, which is not the data's doing.
    Raises UserError if going back would not help.
    """

    def rehearse() -> StepReport:
        return take_step(job, failure.step, trace.batches, rehearsal=True)[1]

    job.processes.watchdog.phase("finding out what is wrong", slow=True)
    job.copies.forget()  # what is wrong may be in them
    job.checkpointer.settle(wait=True)  # one that is being written is from before this
    diagnosis = diagnose(failure.anomaly, trace, rehearse, job.engine, job.health.gradients, job.world)

    def decide() -> Start:
        assert recorder is not None
        job.owner.confirm()
        message = record_anomaly(job.run, failure, diagnosis)
        recorder.message(message)
        most = job.config.health.max_rewinds
        try:
            there = go_back(job.run, job.checkpointer.store, start, failure, message, diagnosis, max_rewinds=most)
        finally:
            job.records.insist()  # recovery.json, also of a run that does not go back
        first, last = failure.window
        left_out = "" if diagnosis.in_weights else f", leaving out samples {first:,} to {last - 1:,}"
        recorder.message(f"going back to step {there.step}{left_out}")
        recorder.close()
        return there

    return job.world.on_main(decide)


def _leave(job: Job, step: int, log: StepLog) -> None:
    """Waits for the save, writes down why the run stops, and raises Preempted on every process."""
    saved = job.checkpointer.close()
    job.copies.close()
    message = f"stopped on request: saved {saved}; the same command with --resume auto continues"
    log.close()
    if job.world.is_main:
        record_event(job.run, "stop", message, reason="preempted", step=step)
    job.world.on_main(job.records.insist)
    raise Preempted(message)


def _finish(job: Job, state: TrainerState, log: StepLog) -> None:
    """The end of a run: its last checkpoint is whole, and the weights are one file."""
    saved: Checkpoint | None = job.checkpointer.close()
    job.copies.close()
    job.world.on_main(lambda: _export(saved, job) if saved else None)
    if job.world.is_main:
        total = job.schedule.total_steps
        record_event(job.run, "stop", f"finished after {counted(total, 'step')}", step=total, reason="finished")
    log.close()
    job.world.on_main(job.records.insist)
    if job.world.is_main:
        say(f"{_outcome(state, job)}\nnext: fastvit report {job.run}")


def _export(checkpoint: Checkpoint, job: Job) -> None:
    job.owner.confirm()
    export_run(checkpoint, job.run)


def _outcome(state: TrainerState, job: Job) -> str:
    """Where the finished run is, and how good the model if it was evaluated."""
    figures = state.accuracy.get("eval", {})
    top1, loss, samples = (figures.get(key) for key in ("top1", "loss", "samples"))
    if loss is None or samples is None:
        return f"finished {job.run}"
    found = f"held-out loss {loss:.4g}" if top1 is None else f"top-1 {format_share(top1)}"
    return f"finished {job.run}: {found} on {counted(int(samples), 'image')}"
