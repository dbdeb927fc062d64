"""What is measured of training steps, and the rows of `metrics.jsonl` that it becomes."""

from collections.abc import Generator, Iterable
from typing import Any

from fastvit_engine.checkpoint import TrainerState
from fastvit_engine.checkpoint.in_memory import Unsettled
from fastvit_engine.data import Batch
from fastvit_engine.observe.recorder import Recorder
from fastvit_engine.train.data_wait import DataWait
from fastvit_engine.train.health.bad_samples import BadSamples
from fastvit_engine.train.health.diagnosis import Trace
from fastvit_engine.train.health.guard import StepReport
from fastvit_engine.train.job import Job
from fastvit_engine.train.observers import Observers
from fastvit_engine.train.packed_cost import PackedCost
from fastvit_engine.train.step import hash_keys
from fastvit_engine.train.throughput import Stopwatch, peak_memory_bytes


class StepLog:
    """Adds up what happens between two logged steps; starts anew when training goes back to a checkpoint."""

    def __init__(self, job: Job, state: TrainerState, observers: Observers, unsettled: Unsettled | None = None) -> None:
        """unsettled: of this process, as it was after the steps of `state`, if training continues from there."""
        config, world = job.config, job.world
        self.job = job
        self.recorder: Recorder | None = None
        if world.is_main:
            total_steps, trackers = job.schedule.total_steps, observers.trackers(job, state.step)
            self.recorder = Recorder(job.run, total_steps, state.step, trackers, job.owner.check_run_folder)
        self.stopwatch = Stopwatch(world.device, seconds_before=state.seconds)
        seen = job.schedule.samples(state.step)
        self.flops = _flops_before(job, state)  # computed in training so far
        self.bad_samples = BadSamples(
            job.run.bad_samples,
            config.data.max_bad_share,
            seen=seen,
            bad=state.bad_samples,
            unsettled=None if unsettled is None else unsettled["bad_samples"],
        )
        self._data_wait = DataWait(config.data.workers)
        self._packed = PackedCost(config, unsettled["packed"] if unsettled else 0) if config.packing.on else None
        self._logs_first = unsettled is None
        job.times.clear()
        self._first_step = self._last_logged = state.step
        self._flops_logged = self.flops

    def watch(self, batches: Iterable[Batch]) -> Generator[Batch]:
        """The batches; counts bad samples, and the time that training waits for each batch."""
        return self.stopwatch.timed(self.bad_samples.watch(batches))

    def step_done(self, step: int, trace: Trace) -> None:
        """`step` optimizer steps are done, the last of them on these batches."""
        for batch in trace.batches:
            self._data_wait.add(batch.seconds)
        if self._packed:
            self._packed.add(trace.batches)  # which `write` adds up over all processes
        else:
            self.flops += self.job.compute.of_steps(self.job.schedule.phases, step - 1, step).computed
        if self.recorder:
            self.recorder.advance(step)
            following = self.job.schedule.phases.at(step)
            if following.first_step == step < self.job.schedule.total_steps:
                self.recorder.message(f"from step {step + 1:,} on: {following.describe()}")

    def is_due(self, step: int) -> bool:
        """Whether a row is to be written after this step: every so often, and after the first."""
        is_first = step == self._first_step + 1 and self._logs_first
        return step % self.job.config.train.log_every == 0 or is_first

    def write(self, step: int, learning_rate: float, report: StepReport, trace: Trace) -> None:
        """Writes the row of a step that is done; collective."""
        job, world = self.job, self.job.world
        batch_size = job.config.train.global_batch_size
        seconds, waited = self.stopwatch.read()
        parts = job.times.take()
        job.processes.stragglers.log_step(waited, parts["forward"], seconds, step, self.recorder)
        own = [part / seconds for part in (waited, *parts.values())]
        packed = [self._packed.take(), self._packed.tokens(trace.batches)] if self._packed else []
        sums = world.sum([*own, *self._data_wait.take(), *packed])  # tokens in float64 are exact
        wait_share, forward, backward, update = (sums[: len(own)] / world.size).tolist()
        stage_seconds = sums[len(own) : len(sums) - len(packed)].tolist()
        flops, tokens = sums[-2:].tolist() if packed else (0.0, None)
        self.flops += flops
        samples_hash = world.sum_int64(sum(hash_keys(batch.keys) for batch in trace.batches) % 2**64)
        memory_bytes = int(world.max([peak_memory_bytes(world.device)]).item())
        bad_count = self.bad_samples.settle(world, self.recorder)
        if self.recorder:
            rate = (step - self._last_logged) * batch_size / seconds
            more: Any = {} if tokens is None else {"tokens": round(tokens)}
            self.recorder.training(
                {
                    "step": step,
                    "epoch": job.schedule.epoch(step),
                    "samples": job.schedule.samples(step),
                    "loss": report.loss,
                    "lr": learning_rate,
                    "grad_norm": report.grad_norm,
                    "images_per_second": rate,
                    "mfu": (self.flops - self._flops_logged) / seconds / job.peak.flops,
                    "data_wait": wait_share,
                    "forward": forward,
                    "backward": backward,
                    "update": update,
                    "memory_bytes": memory_bytes,
                    "samples_hash": f"{samples_hash:016x}",
                    "seconds": self.stopwatch.total,
                    "flops": self.flops,
                    "bad_samples": bad_count,
                    **more,
                }
            )
            if self._last_logged > self._first_step:  # the first step also waits for the workers to start
                warning = self._data_wait.warning(wait_share, stage_seconds)
                if warning:
                    self.recorder.message(warning)
        job.copies.settle(seconds / (step - self._last_logged))
        self._last_logged, self._flops_logged = step, self.flops

    def unsettled(self) -> Unsettled:
        """What this process has counted since the last row."""
        return {"bad_samples": self.bad_samples.unsettled, "packed": self._packed.untaken if self._packed else 0}

    def close(self) -> None:
        if self.recorder:
            self.recorder.close()


def _flops_before(job: Job, state: TrainerState) -> float:
    """Of the run so far; of one that an earlier version began, as its images cost on average."""
    if state.flops is not None or state.step == 0:
        return state.flops or 0.0
    mean = job.compute.mean_per_image(job.schedule.phases, job.schedule.total_steps)
    return float(job.schedule.samples(state.step) * mean.computed)
