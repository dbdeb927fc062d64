"""The training loop. Every process of the run executes `train` from top to bottom."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastvit_engine.checkpoint import Checkpointer, place_of
from fastvit_engine.checkpoint.export import export_run
from fastvit_engine.config import Resolved
from fastvit_engine.data import DataPlan, build_eval_data, build_train_data
from fastvit_engine.data.stream.skip import Window, step_start
from fastvit_engine.distributed.preemption import Preemption
from fastvit_engine.distributed.stragglers import Stragglers
from fastvit_engine.distributed.watchdog import Watchdog
from fastvit_engine.distributed.world import World, join_world, limit_collectives
from fastvit_engine.engine.build import build_engine, split_batch
from fastvit_engine.engine.ema import WeightAverage
from fastvit_engine.errors import Preempted
from fastvit_engine.evaluate.classification import evaluate
from fastvit_engine.files import atomic_write
from fastvit_engine.models import build_model, model_title, parameter_count, training_flops
from fastvit_engine.observe.environment import collect_environment
from fastvit_engine.observe.events import record_event
from fastvit_engine.observe.recorder import Recorder
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.sizing.defaults import Chosen, choose, machine_of
from fastvit_engine.train.data_wait import DataWait
from fastvit_engine.train.health.bad_samples import BadSamples
from fastvit_engine.train.health.diagnosis import GradientWatch, Trace, diagnose
from fastvit_engine.train.health.guard import Anomaly, Guard, StepReport
from fastvit_engine.train.health.replicas import Replicas
from fastvit_engine.train.health.rewind import go_back, record_anomaly
from fastvit_engine.train.schedule import Plan
from fastvit_engine.train.start import Start, load_start, preflight, report_damage
from fastvit_engine.train.state import Job
from fastvit_engine.train.step import hash_keys, take_step
from fastvit_engine.train.throughput import Peak, Stopwatch, peak_flops, peak_memory_bytes
from fastvit_kernels import FusedCrossEntropy

SHOWN_SAMPLES = 48  # images of the evaluation set whose predictions the report shows


def train(resolved: Resolved, out: Path, *, resume: bool) -> None:
    """Trains the model of a configuration into the run folder `out`.

    With `resume`, goes on from the folder's latest checkpoint, if any; without, refuses a folder that holds a run.
    """
    run, limits = RunFolder(out), resolved.config.watchdog
    with (
        Preemption() as preemption,
        join_world(limits.slow_phase_seconds + limits.timeout_seconds, run.stacks) as world,
        Watchdog(run, world, limits) as watchdog,
    ):
        preemption.on_stack_request = watchdog.request_stacks
        chosen = choose(resolved.config, machine_of(world))
        start = world.on_main(lambda: preflight(chosen.config, run, world.size, resume=resume))
        if world.is_main:
            report_damage(run, start.damaged, start.checkpoint)
            print(start.message, flush=True)
        if start.step < start.total_steps:
            if world.is_main:
                print(chosen.describe(), flush=True)
            _train(resolved, chosen, run, start, world, watchdog, preemption)
        elif finished := start.checkpoint:
            world.on_main(lambda: export_run(finished, run))  # it may have been killed just before this


def _train(
    resolved: Resolved,
    chosen: Chosen,
    run: RunFolder,
    start: Start,
    world: World,
    watchdog: Watchdog,
    preemption: Preemption,
) -> None:
    job = _set_up(resolved, chosen, run, start, world, watchdog, preemption)
    part: Start | None = start
    while part is not None:  # more than once where something went wrong
        part = _train_from(part, job)


def _set_up(
    resolved: Resolved,
    chosen: Chosen,
    run: RunFolder,
    start: Start,
    world: World,
    watchdog: Watchdog,
    preemption: Preemption,
) -> Job:
    config = chosen.config
    split = split_batch(config, world.size)
    plan = Plan(config, start.data.samples_per_epoch)
    torch.manual_seed(config.seed)
    model = build_model(config.model, mean=config.data.mean, std=config.data.std)
    engine = build_engine(model, config, split, world)
    limit_collectives(config.watchdog.slow_phase_seconds + config.watchdog.timeout_seconds)  # DeepSpeed's groups too
    place = place_of(config.checkpoint, run)
    ema = WeightAverage(engine, config.ema.decay) if config.ema.decay is not None else None
    watch = GradientWatch(engine, world.device)
    if config.health.watch_gradients:
        watch.start()
    peak = peak_flops(world, config.train.precision)
    if world.is_main:
        _describe_run(resolved, chosen, run, plan, world, peak)
        where = f"{world.size} process(es) on {', '.join(sorted(set(watchdog.hosts)))}, ZeRO-{config.zero.stage}"
        message = f"training begins at step {start.step} of {plan.total_steps}: {where}"
        facts = {"world_size": world.size, "zero_stage": config.zero.stage, "hosts": sorted(set(watchdog.hosts))}
        record_event(run, "start", message, step=start.step, **facts)
    engine.model.train()
    return Job(
        run=run,
        config=config,
        world=world,
        split=split,
        plan=plan,
        engine=engine,
        criterion=FusedCrossEntropy(config.loss.kind, label_smoothing=config.loss.label_smoothing),
        ema=ema,
        checkpointer=Checkpointer(run, place, engine, ema, world, config.checkpoint, plan.keep_every),
        guard=Guard(engine, world, config.health, config.train.precision),
        replicas=Replicas(engine, world),
        watch=watch,
        watchdog=watchdog,
        stragglers=Stragglers(run, world, config.watchdog, watchdog.hosts, zero_stage=engine.zero_stage),
        preemption=preemption,
        peak=peak,
        flops_per_image=training_flops(config.model),
    )


def _train_from(start: Start, job: Job) -> Start | None:
    """Trains to the end of the run and returns None; or, at an anomaly, returns where to go on instead."""
    run, config, world, plan = job.run, job.config, job.world, job.plan
    guard, watchdog, checkpointer = job.guard, job.watchdog, job.checkpointer
    batch_size = config.train.global_batch_size

    # ---- weights: those of the checkpoint, or the first
    watchdog.phase("loading", slow=True)
    start = load_start(start, checkpointer, run, world)
    guard.forget(start.recent)
    consumed = start.consumed
    accuracy: dict[str, dict[str, Any]] = {}
    evaluated_at: int | None = None

    # ---- data, from the first sample on that is still to be trained on
    bad_samples = BadSamples(
        run.bad_samples, config.data.max_bad_share, seen=start.step * batch_size, bad=start.bad_samples
    )
    batches = bad_samples.watch(
        build_train_data(
            config,
            start.data,
            rank=world.rank,
            world_size=world.size,
            micro_batch_size=job.split.micro_batch_size,
            consumed=consumed,
            pin_memory=world.device.type == "cuda",
            node_ranks=world.node_ranks if world.rank == world.node_ranks[0] else (),
            skipped=start.skipped,
        )
    )

    # ---- the run's record
    recorder = Recorder(run, plan.total_steps, start.step) if world.is_main else None
    if recorder:
        checkpointer.say = recorder.message
    stopwatch = Stopwatch(world.device, seconds_before=start.seconds)
    data_wait = DataWait(config.data.num_workers)
    last_logged = start.step

    def save(step: int) -> None:
        """Begins a save, whose copy to host memory the next update waits for; a later `settle` tells how it went."""
        watchdog.phase("saving", slow=True)
        state = {
            "seconds": stopwatch.total,
            "consumed": consumed,
            "skipped": start.skipped,
            "recent": list(guard.recent),
            "bad_samples": bad_samples.bad,
            "fingerprint": start.fingerprint,
            "accuracy": accuracy,
            "evaluated_at": evaluated_at,
        }
        with stopwatch.paused():
            checkpointer.save(step, state)

    if start.checkpoint is None:
        save(0)  # to have something to go back to
    watchdog.begin(start.step)
    for step in range(start.step, plan.total_steps):
        done = step + 1
        last = done == plan.total_steps
        evaluates = config.data.eval is not None and (last or plan.evaluates_after(done))
        compares = config.health.compare_replicas_every is not None and done % config.health.compare_replicas_every == 0
        first_sample = step_start(consumed, start.skipped)
        window = (first_sample, first_sample + batch_size)

        # ---- one optimizer step on one global batch
        learning_rate = plan.learning_rate(step)
        job.engine.set_learning_rate(learning_rate)
        guard.flag = float(job.preemption.signal is not None)
        trace, report = take_step(job, step, stopwatch.timed(batches), compares=compares)
        if report.anomaly:
            return _recover(job, start, step, window, report.anomaly, report, trace, recorder)
        leaves = report.flags > 0 and not last  # any of the processes was asked to
        saves = last or leaves or plan.saves_after(done)
        consumed = window[1]
        if job.ema is not None:
            job.ema.update(step)
        watchdog.step_done(done)
        if recorder:
            recorder.advance(done)

        # ---- report
        for batch in trace.batches:
            data_wait.add(batch.seconds)
        if done % config.train.log_every == 0 or saves or done == start.step + 1:
            watchdog.phase("reporting")
            seconds, waited = stopwatch.lap()
            job.stragglers.log_step(waited, seconds, done, recorder)
            waited, *stage_seconds = world.sum([waited / seconds, *data_wait.lap()]).tolist()
            wait_share = waited / world.size
            samples_hash = world.sum_int64(sum(hash_keys(batch.keys) for batch in trace.batches) % 2**64)
            memory_bytes = int(world.max([peak_memory_bytes(world.device)]).item())
            bad_count = bad_samples.settle(world, recorder)
            if recorder:
                rate = (done - last_logged) * batch_size / seconds
                recorder.training(
                    {
                        "step": done,
                        "epoch": plan.epoch(done),
                        "samples": done * batch_size,
                        "loss": report.loss,
                        "lr": learning_rate,
                        "grad_norm": report.grad_norm,
                        "images_per_second": rate,
                        "mfu": rate * job.flops_per_image / job.peak.flops,
                        "data_wait": wait_share,
                        "memory_bytes": memory_bytes,
                        "samples_hash": f"{samples_hash:016x}",
                        "seconds": stopwatch.total,
                        "bad_samples": bad_count,
                    }
                )
                warning = data_wait.warning(wait_share, stage_seconds) if last_logged > start.step else None
                if warning:  # the first step also waits for the workers to start
                    recorder.message(warning)
            last_logged = done
            checkpointer.settle()

        # ---- evaluate
        if evaluates:
            with stopwatch.paused():
                accuracy, evaluated_at = evaluate_all(job, start.data, done, recorder), done

        # ---- save, but never weights that are broken
        if saves:
            if anomaly := job.replicas.compare():
                return _recover(job, start, step, window, anomaly, report, trace, recorder)
            save(done)

        # ---- leave, if asked to
        if leaves:
            saved = checkpointer.close()
            message = f"asked to leave: saved {saved}; the same command with --resume auto goes on"
            if recorder:
                recorder.close()
                record_event(run, "stop", message, reason="preempted", step=done)
            raise Preempted(message)

    # ---- the end: the last checkpoint is whole, and the weights are one file
    saved = checkpointer.close()
    world.on_main(lambda: export_run(saved, run) if saved else None)
    if recorder:
        record_event(run, "stop", f"finished after {plan.total_steps} steps", step=plan.total_steps, reason="finished")
        recorder.close()
    return None


def _recover(
    job: Job,
    start: Start,
    step: int,
    window: Window,
    anomaly: Anomaly,
    report: StepReport,
    trace: Trace,
    recorder: Recorder | None,
) -> Start:
    """Finds out what is wrong, writes it down, and returns the point that the run goes back to. UserError: it gives up.

    The samples of the step are left out from now on; not where weights were at fault, which is not the data's doing.
    """

    def rehearse() -> StepReport:
        return take_step(job, step, trace.batches, rehearsal=True)[1]

    job.watchdog.phase("finding out what is wrong", slow=True)
    job.checkpointer.settle(wait=True)  # one that is being written is from before this
    diagnosis = diagnose(anomaly, trace, rehearse, job.engine, job.watch, job.world)

    def decide() -> Start:
        assert recorder is not None
        message = record_anomaly(job.run, step, window, anomaly, report, diagnosis)
        recorder.message(message)
        skip, most = not diagnosis.in_weights, job.config.health.max_rewinds
        place = job.checkpointer.place
        there = go_back(job.run, place, start, step, window, message, skip=skip, most=most)
        left_out = f", leaving out samples {window[0]:,} to {window[1] - 1:,}" if skip else ""
        recorder.message(f"going back to step {there.step}{left_out}")
        recorder.close()
        return there

    return job.world.on_main(decide)


def evaluate_all(job: Job, data: DataPlan, step: int, recorder: Recorder | None) -> dict[str, dict[str, Any]]:
    """Evaluates the weights and, where there is one, their average; writes the rows and the predictions to show."""
    config, world, run = job.config, job.world, job.run
    criterion = FusedCrossEntropy(config.loss.kind)
    results = {}

    def run_one(name: str) -> None:
        bad_samples = BadSamples(run.bad_samples, config.data.max_bad_share)
        batches = build_eval_data(
            config,
            data,
            rank=world.rank,
            world_size=world.size,
            batch_size=config.evaluate.batch_size or job.split.micro_batch_size,
            pin_memory=world.device.type == "cuda",
        )
        stopwatch = Stopwatch(world.device)
        shown_here = SHOWN_SAMPLES if world.is_main else 0
        watched = job.watchdog.marked(bad_samples.watch(batches), "evaluating")
        accuracy, examples = evaluate(job.engine.model, watched, criterion, world, shown=shown_here)
        bad_samples.settle(world, recorder)
        seconds, _ = stopwatch.lap()
        results[name] = asdict(accuracy)
        if recorder:
            recorder.evaluation(
                {
                    "step": step,
                    "eval": name,
                    "top1": accuracy.top1,
                    "top5": accuracy.top5,
                    "loss": accuracy.loss,
                    "samples": accuracy.samples,
                    "seconds": seconds,
                }
            )
            shown = {"step": step, "class_names": data.class_names, "samples": examples}
            atomic_write(run.samples, json.dumps(shown))

    run_one("eval")
    if job.ema is not None:
        with job.ema.applied():
            run_one("eval_ema")
    return results


def _describe_run(resolved: Resolved, chosen: Chosen, run: RunFolder, plan: Plan, world: World, peak: Peak) -> None:
    config = chosen.config
    on_gpu = world.device.type == "cuda"
    environment = collect_environment(
        model=model_title(config.model),
        parameters=parameter_count(config.model),
        training_flops_per_image=training_flops(config.model),
        peak_flops=peak.flops,
        peak_flops_source=peak.source,
        world_size=world.size,
        zero_stage=config.zero.stage,
        precision=config.train.precision,
        device=torch.cuda.get_device_name(world.device) if on_gpu else "cpu",
        total_steps=plan.total_steps,
        global_batch_size=config.train.global_batch_size,
        samples_per_epoch=plan.samples_per_epoch,
        shards=", ".join(source.shards for source in config.data.sources),
        defaults=chosen.record(),
    )
    atomic_write(run.config, resolved.to_yaml())
    atomic_write(run.environment, json.dumps(environment, indent=1))
