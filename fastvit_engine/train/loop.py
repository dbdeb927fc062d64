"""The training loop. Every process of the run executes `train` from top to bottom."""

import json
import math
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvit_engine.config import Config, DataConfig, Resolved
from fastvit_engine.data import Batch, DataPlan, build_eval_data, build_train_data
from fastvit_engine.data.batch import targets
from fastvit_engine.data.mix import mix
from fastvit_engine.data.randaugment import randaugment
from fastvit_engine.errors import UserError
from fastvit_engine.evaluate.classification import evaluate
from fastvit_engine.models import build_model, model_title, training_flops
from fastvit_engine.observe.recorder import Recorder
from fastvit_engine.observe.run_folder import RunFolder, atomic_write, collect_environment
from fastvit_engine.train.bad_samples import BadSamples
from fastvit_engine.train.checkpoint import Checkpointer, place_of
from fastvit_engine.train.data_wait import DataWait
from fastvit_engine.train.distributed import World, join_world
from fastvit_engine.train.ema import WeightAverage
from fastvit_engine.train.engine import BatchSplit, build_engine, set_learning_rate, split_batch
from fastvit_engine.train.engine_state import EngineState
from fastvit_engine.train.export import export_run
from fastvit_engine.train.plan import Plan
from fastvit_engine.train.preflight import Start, preflight
from fastvit_engine.train.resume import load_start, report_damage
from fastvit_engine.train.throughput import Peak, Stopwatch, peak_flops, peak_memory_bytes
from fastvit_kernels import FusedCrossEntropy

SHOWN_SAMPLES = 48  # images of the evaluation set whose predictions the report shows


def train(resolved: Resolved, out: Path, *, resume: bool) -> None:
    """Trains the model of a configuration into the run folder `out`.

    With `resume`, goes on from the folder's latest checkpoint, if any; without, refuses a folder that holds a run.
    """
    with join_world() as world:
        run = RunFolder(out)
        start = world.on_main(lambda: preflight(resolved.config, run, world.size, resume=resume))
        if world.is_main:
            report_damage(run, start.damaged, start.checkpoint)
            print(start.message, flush=True)
        if start.step < start.total_steps:
            _train(resolved, run, start, world)
        else:
            finished = start.checkpoint
            world.on_main(lambda: export_run(finished, run) if finished else None)


def _train(resolved: Resolved, run: RunFolder, start: Start, world: World) -> None:
    config = resolved.config
    split = split_batch(config, world.size)
    plan = Plan(config, start.data.samples_per_epoch)

    # ---- model, optimizer, DeepSpeed
    torch.manual_seed(config.seed)
    model = build_model(config.model, mean=config.data.mean, std=config.data.std)
    engine = build_engine(model, config, split, world)
    criterion = FusedCrossEntropy(config.loss.kind, label_smoothing=config.loss.label_smoothing)
    state = EngineState(engine)
    ema = WeightAverage(state, config.ema.decay) if config.ema.decay is not None else None
    place = place_of(config.checkpoint, run)
    checkpointer = Checkpointer(run, place, state, ema, world, config.checkpoint, plan.keep_every)
    start = load_start(start, checkpointer, run, world)

    # ---- data, from the first sample on that is still to be trained on
    bad_samples = BadSamples(run.bad_samples, config.data.max_bad_share, seen=start.consumed, bad=start.bad_samples)
    batches = bad_samples.watch(
        build_train_data(
            config,
            start.data,
            rank=world.rank,
            world_size=world.size,
            micro_batch_size=split.micro_batch_size,
            consumed=start.consumed,
            pin_memory=world.device.type == "cuda",
            node_ranks=world.node_ranks if world.rank == world.node_ranks[0] else (),
        )
    )

    # ---- the run's record
    peak = peak_flops(world, config.train.precision)
    flops_per_image = training_flops(config.model)
    if world.is_main:
        _describe_run(resolved, run, plan, world, model, peak)
    recorder = Recorder(run, plan.total_steps, start.step) if world.is_main else None
    stopwatch = Stopwatch(world.device, seconds_before=start.seconds)
    data_wait = DataWait(config.data.num_workers)
    if recorder:
        checkpointer.say = recorder.message
    last_logged = start.step
    accuracy, evaluated_at = {}, None

    engine.train()
    for step in range(start.step, plan.total_steps):
        # ---- one optimizer step on one global batch
        learning_rate = plan.learning_rate(step)
        set_learning_rate(engine, learning_rate)
        seed_step(config.seed, step, world)
        loss_sum = torch.zeros((), device=world.device)
        keys_hash = 0
        for _ in range(split.accumulation_steps):
            with stopwatch.waiting_for_data():
                batch = next(batches)
            data_wait.add(batch.seconds)
            loss = training_loss(engine, criterion, batch, config.data, world)
            engine.backward(loss)
            engine.step()
            loss_sum += loss.detach()
            keys_hash = (keys_hash + hash_keys(batch.keys)) % 2**64
        if ema is not None:
            ema.update(step)
        done = step + 1
        last = done == plan.total_steps
        evaluates = config.data.eval is not None and (last or plan.evaluates_after(done))
        saves = last or plan.saves_after(done)
        if recorder:
            recorder.advance(done)

        # ---- report; before every checkpoint too, so that none is written of a model that has diverged
        if done % config.train.log_every == 0 or saves or done == start.step + 1:
            loss_mean = world.sum([loss_sum.item() / split.accumulation_steps]).item() / world.size
            seconds, waited = stopwatch.lap()
            waited, *stage_seconds = world.sum([waited / seconds, *data_wait.lap()]).tolist()
            wait_share = waited / world.size
            samples_hash = world.sum_int64(keys_hash)
            memory_bytes = int(world.max([peak_memory_bytes(world.device)]).item())
            bad_count = bad_samples.settle(world, recorder)
            if recorder:
                rate = (done - last_logged) * config.train.global_batch_size / seconds
                recorder.training(
                    {
                        "step": done,
                        "epoch": plan.epoch(done),
                        "samples": done * config.train.global_batch_size,
                        "loss": loss_mean,
                        "lr": learning_rate,
                        "grad_norm": _as_float(engine.get_global_grad_norm()),
                        "images_per_second": rate,
                        "mfu": rate * flops_per_image / peak.flops,
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
            if not math.isfinite(loss_mean):
                raise UserError(
                    f"the loss is {loss_mean} at step {done}: lower optimizer.learning_rate, lengthen schedule.warmup "
                    f"or set train.grad_clip; the run can go on from its latest checkpoint in {run.checkpoints}"
                )

        # ---- evaluate
        if evaluates:
            with stopwatch.paused():
                accuracy = evaluate_all(engine, ema, config, start.data, split, world, run, done, recorder)
                evaluated_at = done

        # ---- save: the step waits for a copy to host memory, and a later `settle` tells how writing it went
        if saves:
            with stopwatch.paused():
                state_of_run = {
                    "seconds": stopwatch.total,
                    "consumed": done * config.train.global_batch_size,
                    "bad_samples": bad_samples.bad,
                    "fingerprint": start.fingerprint,
                    "accuracy": accuracy,
                    "evaluated_at": evaluated_at,
                }
                checkpointer.save(done, state_of_run)

    # ---- the end: the last checkpoint is whole, and the weights are one file
    saved = checkpointer.close()
    world.on_main(lambda: export_run(saved, run) if saved else None)
    if recorder:
        recorder.close()


def training_loss(engine: Any, criterion: FusedCrossEntropy, batch: Batch, data: DataConfig, world: World) -> Tensor:
    """Mean loss over one micro-batch, where a sample of weight 0 counts as a loss of 0, as does one mixed with it."""
    images = batch.images.to(world.device, non_blocking=True)  # uint8 [B, H, W, 3]; normalised by the patch embedding
    labels = batch.labels.to(world.device, non_blocking=True)
    weights = batch.weights.to(world.device, non_blocking=True)
    if data.randaugment_ops:
        images = randaugment(images, batch.seeds, num_ops=data.randaugment_ops, magnitude=data.randaugment_magnitude)
    if data.mixup or data.cutmix:
        mixed = mix(images, labels, batch.seeds, mixup=data.mixup, cutmix=data.cutmix, mean=data.mean, std=data.std)
        logits = engine(mixed.images)
        labels, labels_b = (targets(given, logits.shape[1]) for given in (labels, mixed.labels_b))
        losses = criterion(logits, labels, labels_b=labels_b, mix_weight=mixed.weight, reduction="none")
        weights = weights * weights[mixed.partner]
    else:
        logits = engine(images)
        losses = criterion(logits, targets(labels, logits.shape[1]), reduction="none")
    return (losses * weights).mean()


def evaluate_all(
    engine: Any,
    ema: WeightAverage | None,
    config: Config,
    data: DataPlan,
    split: BatchSplit,
    world: World,
    run: RunFolder,
    step: int,
    recorder: Recorder | None,
) -> dict[str, dict[str, Any]]:
    """Evaluates the weights and, where there is one, their average; writes the rows and the predictions to show."""
    criterion = FusedCrossEntropy(config.loss.kind)
    results = {}

    def run_one(name: str) -> None:
        bad_samples = BadSamples(run.bad_samples, config.data.max_bad_share)
        batches = build_eval_data(
            config,
            data,
            rank=world.rank,
            world_size=world.size,
            batch_size=config.evaluate.batch_size or split.micro_batch_size,
            pin_memory=world.device.type == "cuda",
        )
        stopwatch = Stopwatch(world.device)
        shown_here = SHOWN_SAMPLES if world.is_main else 0
        accuracy, examples = evaluate(engine, bad_samples.watch(batches), criterion, world, shown=shown_here)
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
    if ema is not None:
        with ema.applied():
            run_one("eval_ema")
    return results


def seed_step(seed: int, step: int, world: World) -> None:
    """Makes dropout and drop-path of a step a function of (seed, step, rank), which a resumed run repeats."""
    key = int.from_bytes(blake2b(f"{seed}/{step}/{world.rank}".encode(), digest_size=7).digest(), "big")
    torch.default_generator.manual_seed(key)  # torch.manual_seed also formats a stack trace: 0.1 ms a step
    if world.device.type == "cuda":
        torch.cuda.manual_seed(key)


def hash_keys(keys: list[str]) -> int:
    """The sum, modulo 2**64, of each key's 64-bit hash: the same however a global batch is split over processes."""
    return sum(int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big") for key in keys) % 2**64


def _describe_run(
    resolved: Resolved, run: RunFolder, plan: Plan, world: World, model: torch.nn.Module, peak: Peak
) -> None:
    config = resolved.config
    on_gpu = world.device.type == "cuda"
    environment = collect_environment(
        model=model_title(config.model),
        parameters=sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()),
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
    )
    atomic_write(run.config, resolved.to_yaml())
    atomic_write(run.environment, json.dumps(environment, indent=1))


def _as_float(value: Any) -> float | None:
    return None if value is None else float(value)
