"""Validates a run before it starts, and decides where it resumes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from fastvit_engine.checkpoint import (
    Checkpoint,
    Checkpointer,
    CheckpointStore,
    DamagedCheckpoint,
    Recovery,
    TrainerState,
    another_place,
    doubt_about_latest,
    store_of,
    usable_checkpoints,
)
from fastvit_engine.checkpoint.format import MANIFEST
from fastvit_engine.checkpoint.in_memory import MemoryStore
from fastvit_engine.checkpoint.local import LocalStore
from fastvit_engine.config import Config, EvalTransform, ModelConfig, Resolved
from fastvit_engine.config.checks import check_config
from fastvit_engine.config.sections import BEFORE_EVAL_TRANSFORM, ProfileConfig, profiled_steps
from fastvit_engine.config.timm_model import is_timm
from fastvit_engine.data import IterableData, TrainingData, prepare_data
from fastvit_engine.data.stream.batch_split import BatchSplit, split_batch
from fastvit_engine.data.stream.gpu_decode import check_nvjpeg
from fastvit_engine.data.stream.prepare import FewShotData, prepare_few_shot
from fastvit_engine.distributed.world import World
from fastvit_engine.duration import BatchSizes
from fastvit_engine.engine.build import deepspeed_config
from fastvit_engine.engine.optimizers.apex import check_apex
from fastvit_engine.errors import UserError
from fastvit_engine.models import resolve_shape
from fastvit_engine.models.fp8 import check_fp8_device
from fastvit_engine.models.timm_measure import normalises_batches
from fastvit_engine.observe.disk import insist
from fastvit_engine.observe.events import read_events, record_event
from fastvit_engine.observe.run_folder import WORKING_FOLDERS, RunFolder
from fastvit_engine.observe.units import counted
from fastvit_engine.shown import public_url, say
from fastvit_engine.sizing.defaults import Chosen
from fastvit_engine.train.recovery import load_recovery
from fastvit_engine.train.schedule import Schedule


@dataclass(frozen=True)
class Start:
    """Where a run starts, and what it knows then; from `checkpoint`, if there is one."""

    state: TrainerState
    total_steps: int
    checkpoint: Checkpoint | None
    message: str
    data: TrainingData
    damaged: tuple[str, ...] = ()  # what is wrong with newer checkpoints, which are passed over
    warnings: tuple[str, ...] = ()  # what is allowed, but hardly meant
    eval_transform: EvalTransform = "timm"  # what the run evaluates with: the configuration's, or the checkpoint's
    few_shot: FewShotData | None = None  # what evaluate.fewshot reads
    saves_first: bool = False  # whether to save before the first step: a kill has ended a save, or it was due
    batch_before: int | None = None  # the checkpoint's train.global_batch_size, if the run is to continue with another

    @property
    def step(self) -> int:
        """Steps done; `total_steps` for a run that is complete."""
        return min(self.state.step, self.total_steps)

    def at(self, checkpoint: Checkpoint, state: TrainerState) -> "Start":
        """The same run from a checkpoint on; what it remembers of going back stays."""
        recovery = state.recovery.merge(self.state.recovery)
        batches = state.batches.then(state.step, self.state.batches.current)
        continued = replace(
            state,
            fingerprint=self.state.fingerprint,
            pixels=self.state.pixels,
            class_names=self.state.class_names,
            recovery=recovery,
            batch_sizes=batches.changes,
        )
        return replace(self, state=continued, checkpoint=checkpoint)

    def beginning_with(self, init: Mapping[str, str], notes: Sequence[str] = ()) -> "Start":
        """The same start, of a run that begins with weights of another. notes: on them, for the log."""
        source = init["file"].removesuffix(f"/{MANIFEST}")
        begins = f"{self.message}\nstarting from the weights of {source}, head {init['head']}"
        return replace(self, state=replace(self.state, init=init), message="\n".join([begins, *notes]))

    def settle(self, resolved: Resolved, chosen: Chosen) -> tuple[Resolved, Chosen]:
        """The configuration, as given and without open ends, with the evaluation that the run keeps."""
        kept = self.eval_transform
        if resolved.config.data.eval_transform == kept:
            return resolved, chosen
        origins = {**resolved.origins, "data.eval_transform": "checkpoint"}
        return (
            Resolved(_evaluating_with(resolved.config, kept), origins),
            replace(chosen, config=_evaluating_with(chosen.config, kept)),
        )


@dataclass(frozen=True)
class DryRun:
    """A start that is only tried: on which devices, and where indexes are made that are missing."""

    on_gpu: bool
    scratch: Path


def preflight(
    config: Config,
    run: RunFolder,
    world_size: int,
    *,
    resume: bool,
    data: IterableData | None = None,
    allow_batch_change: bool = False,
    dry_run: DryRun | None = None,
    in_memory: Checkpoint | None = None,
) -> Start:
    """Checks configuration, data and run folder; raises UserError for what cannot work.

    data: takes the place of data.train. allow_batch_change: `train.global_batch_size` may differ from the checkpoint's.
    dry_run: nothing is written but what it says. in_memory: a copy that the launcher has of the state of this run.
    """
    scratch = None if dry_run is None else dry_run.scratch
    check_config(config)
    if config.init.from_ is not None and "num_classes" not in config.model.model_fields_set:
        raise UserError(
            "model.num_classes is not set, and the new head of a model that starts from init.from needs the number of "
            "classes of your data (`fastvit data stats` counts them): add --set model.num_classes=N, or keep the head "
            "of the weights with --set init.head=keep"
        )
    if data is not None and config.tokens.image_sizes:
        raise UserError(
            "tokens.image_sizes wants smaller images at first, and an iterable of your own gives images of "
            "model.image_size: set tokens.image_sizes=[], or train on shards"
        )
    split = split_batch(config, world_size)
    check_whole_batches(config, split)
    on_gpu = torch.cuda.is_available() if dry_run is None else dry_run.on_gpu
    deepspeed_config(config, split, on_gpu=on_gpu)
    check_nvjpeg(config, own_data=data is not None, on_gpu=on_gpu, here=dry_run is None)
    if dry_run is None:  # which may be for another machine
        check_apex(config)
        check_fp8_device(config)
    store = store_of(config.checkpoint, run)
    if run.config.exists() and not resume:
        raise UserError(
            f"{run} already holds a run: add --resume auto (from Python: resume=True) to continue it, or choose "
            "another folder with --out"
        )
    candidates = usable_checkpoints(store)
    if candidates and not resume:
        raise UserError(
            f"{store.describe('')} already holds checkpoints of a run: add --resume auto (from Python: resume=True) to "
            "continue it, or choose another checkpoint.path"
        )
    on_disk = next((candidate.step for candidate in candidates), None)
    if in_memory is not None and in_memory.step >= (on_disk or 0):
        candidates.insert(0, in_memory)
    if not candidates:
        _check_none_elsewhere(run, store)
    checkpoint, state, damaged = newest_readable(candidates)
    recorded = None if state is None else state.fingerprint.get("data")
    prepared = prepare_data(
        config, world_size=world_size, index_folder=run.path, recorded=recorded, given=data, scratch=scratch
    )
    batch = config.train.global_batch_size
    batches = BatchSizes.always(batch) if state is None else state.batches.then(state.step, batch)
    schedule = Schedule(config, prepared.samples_per_epoch, batches)
    if state is None or state.step < schedule.total_steps:
        check_profile(config.train.profile, schedule.total_steps, world_size)
    if scratch is None:
        _check_writable(run)
    transform = _eval_transform(config, state)
    wanted = TrainerState(
        step=0,
        fingerprint=fingerprint(config, prepared),
        recovery=load_recovery(run),
        pixels={
            "mean": config.data.mean,
            "std": config.data.std,
            "eval_crop": config.data.eval_crop,
            "eval_transform": transform,
        },
        class_names=tuple(prepared.class_names) if prepared.class_names and config.model.num_classes else None,
        batch_sizes=BatchSizes.always(batch).changes,
    )
    working = "" if run.url is None else f"\nworking folder: {run.path}"
    message = f"starting {run}: {counted(schedule.total_steps, 'step')}, {prepared.describe()}{working}"
    doubt = doubt_about_latest(store) if on_disk is not None else None
    warnings = (*([doubt] if doubt else []), *_doubtful(config, prepared, split))
    few_shot = prepare_few_shot(_evaluating_with(config, transform), run.path, scratch)
    start = Start(wanted, schedule.total_steps, None, message, prepared, damaged, warnings, transform, few_shot)
    if checkpoint is None or state is None:
        return start
    elsewhere = another_place(config.checkpoint)
    _check_same_run(wanted.fingerprint, state.fingerprint, checkpoint, elsewhere, allow_batch_change=allow_batch_change)
    if (before := state.batches.current) != batch:
        prepared.check_batch_change(config, before)
        start = replace(start, batch_before=before)
    start = replace(start, warnings=(*start.warnings, *_too_late(config, state)))
    if checkpoint is in_memory:
        start = replace(
            start, saves_first=on_disk is None or schedule.is_missed(schedule.save_every, on_disk, state.step)
        )
    if state.step < schedule.total_steps:
        where = ", a copy in memory" if checkpoint is in_memory else ""
        message = f"continuing {run} from step {state.step} of {schedule.total_steps}{where}, {prepared.describe()}"
        message += working
        if config.data.eval and transform != config.data.eval_transform:
            message += (
                f"\nevaluation stays {transform}, as so far, for figures that can be compared: to change it, set "
                f"data.eval_transform={config.data.eval_transform}"
            )
    else:
        top1 = state.accuracy.get("eval", {}).get("top1")
        accuracy = "" if top1 is None else f" and top-1 {top1:.1%}"
        longer = ""
        if state.step > schedule.total_steps:
            longer = f" (more than the {schedule.total_steps:,} of train.duration = '{config.train.duration}')"
        message = f"{run} is complete, with {counted(state.step, 'step')}{longer}{accuracy}: nothing to do"
    return replace(start, message=message).at(checkpoint, state)


def check_whole_batches(config: Config, split: BatchSplit) -> None:
    """Raises UserError if a model normalises by batches, and those of the processes are not of the same size."""
    if not is_timm(config.model) or split.equal or not normalises_batches(config.model):
        return
    raise UserError(
        f"{config.model.name} normalises by the images of a micro-batch, and train.global_batch_size = "
        f"{split.global_batch_size:,} does not make equal ones on {split.world_size} processes: make it a multiple of "
        "them"
    )


def _eval_transform(config: Config, state: TrainerState | None) -> EvalTransform:
    """What the run evaluates with: what is set; else, of a run that is continued, what it did so far."""
    if state is None or "eval_transform" in config.data.model_fields_set:
        return config.data.eval_transform
    return (state.pixels or {}).get("eval_transform") or BEFORE_EVAL_TRANSFORM


def _evaluating_with(config: Config, transform: EvalTransform) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"eval_transform": transform})})


def move_to_latest(start: Start, store: CheckpointStore, recovery: Recovery) -> Start:
    """`start` at the newest checkpoint that can be read, with what the run remembers by now."""
    checkpoint, state, damaged = newest_readable(usable_checkpoints(store), start.damaged)
    if checkpoint is None or state is None:
        raise UserError(f"{store.describe('')} has no checkpoint to go back to: start the same command again")
    return replace(start, state=replace(start.state, recovery=recovery), damaged=damaged).at(checkpoint, state)


def newest_readable(
    candidates: list[Checkpoint], damaged: tuple[str, ...] = ()
) -> tuple[Checkpoint | None, TrainerState | None, tuple[str, ...]]:
    """The first checkpoint whose manifest can be read, the state in it, and what is wrong with those passed over.

    `damaged`: what was wrong with others before. Raises UserError if there are damaged ones only.
    """
    for checkpoint in candidates:
        try:
            return checkpoint, checkpoint.read_manifest().state, damaged
        except DamagedCheckpoint as damage:
            damaged = (*damaged, str(damage))
    if damaged:
        raise UserError(
            f"{damaged[0]}, and there is no older checkpoint to continue from: restore the file, or start again in "
            "another run folder"
        )
    return None, None, ()


def fingerprint(config: Config, data: TrainingData) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued: parameters, objective, and the order of the data.

    Of the model, only what shapes its parameters and what they mean is compared: see `_shape`. The number of processes,
    the ZeRO stage and the precision may change: checkpoints hold fp32 masters, whole.
    """
    of_objective = (
        {} if config.pretraining is None else {config.train.objective: config.pretraining.model_dump(mode="json")}
    )
    return {
        "model": config.model.model_dump(mode="json"),
        "global_batch_size": config.train.global_batch_size,
        "seed": config.seed,
        "data": data.fingerprint(config.data),
        "optimizer": {"kind": config.optimizer.kind, "frozen": config.optimizer.frozen},
        "objective": config.train.objective,
        **of_objective,
    }


def _doubtful(config: Config, data: TrainingData, split: BatchSplit) -> tuple[str, ...]:
    """One sentence for each setting that works with this data, but that hardly anybody wants."""
    warnings = []
    classes, outputs = len(data.class_names or ()), config.model.num_classes
    if 0 < classes < outputs:
        warnings.append(
            f"data.train has {counted(classes, 'class', 'classes')} and model.num_classes is {outputs:,}, so "
            f"{counted(outputs - classes, 'output')} will never see an image: set model.num_classes={classes}"
        )
    if config.optimizer.frozen == "backbone" and config.evaluate.fewshot.every is not None:
        warnings.append(
            "optimizer.frozen = backbone keeps the features as they are, so few-shot accuracy is measured once, at the "
            "end, and not every evaluate.fewshot.every: leave that out"
        )
    batch, samples = config.train.global_batch_size, data.samples_per_epoch
    if samples is not None and batch > samples:
        warnings.append(
            f"train.global_batch_size is {batch:,}, and an epoch has only {counted(samples, 'sample')}: every step "
            "repeats samples; lower it"
        )
    if split.idle_ranks:
        warnings.append(
            f"{split.idle_ranks} of {split.world_size} processes have nothing to do: images are mixed in pairs, of "
            f"which train.global_batch_size = {batch:,} has fewer; raise it to {2 * split.world_size:,}"
        )
    return tuple(warnings)


def _too_late(config: Config, state: TrainerState) -> tuple[str, ...]:
    """One sentence for each setting of the first weights that differs from the one the run began with."""
    now, before = config.model.model_dump(mode="json"), _as_today(state.fingerprint["model"])
    source, began_with = config.init.from_, (state.init or {}).get("from")
    other_weights: tuple[str, ...] = ()
    if source is not None and public_url(source) != began_with:
        other_weights = (
            f"init.from = {public_url(source)} sets the first weights only, and this run began with "
            f"{began_with or 'weights of its own'}: it continues with those of its checkpoint",
        )
    return other_weights + tuple(
        f"model.{key} = {now[key]} sets the first weights only: the run continues with those of its checkpoint"
        for key in _OF_FIRST_WEIGHTS
        if now[key] != before.get(key, now[key])
    )


def check_profile(config: ProfileConfig, total_steps: int, world_size: int) -> None:
    """Raises UserError if the run has no such steps or ranks."""
    if config.steps is None:
        return
    if profiled_steps(config.steps)[1] > total_steps:
        raise UserError(
            f"train.profile.steps is {config.steps}, and the run has {counted(total_steps, 'step')}: choose some of "
            "them"
        )
    if max(config.ranks) >= world_size:
        raise UserError(
            f"train.profile.ranks has {max(config.ranks)}, and the run has ranks 0 to {world_size - 1}: choose some of "
            "them"
        )


def _check_writable(run: RunFolder) -> None:
    folder = run.checkpoints if run.url is None else run.path

    def probe() -> None:
        path = folder / ".writable"
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.unlink()

    if run.url is None:
        insist(probe, f"run folder {run.path}", instead="one with --out")
    else:
        insist(probe, f"working folder {run.path}", instead=f"folder with {WORKING_FOLDERS}")


def _check_none_elsewhere(run: RunFolder, store: CheckpointStore) -> None:
    """Raises UserError if a run that has no checkpoint here has saved one elsewhere: it would begin again."""
    saved = [event["path"] for event in read_events(run) if event["event"] == "checkpoint" and "path" in event]  # type: ignore[typeddict-item]
    if not saved:
        return
    place, here = str(saved[-1]).rpartition("/")[0], store.describe("").rstrip("/")
    stays_behind = run.url is not None and isinstance(store, LocalStore)  # on the machine that wrote it
    if stays_behind or place != here:
        raise UserError(
            f"{run} has saved checkpoints in {place}, and {here} has none: set checkpoint.path to where "
            "they are now, or choose another run folder with --out"
        )


def _check_same_run(
    wanted: Mapping[str, Any],
    saved: Mapping[str, Any],
    checkpoint: Checkpoint,
    elsewhere: str,
    *,
    allow_batch_change: bool,
) -> None:
    """elsewhere: what another run must have, see `another_place`."""
    for name, before in {**_FIRST, **saved}.items():
        now: Any = wanted.get(name)
        if now == before or (name == "global_batch_size" and allow_batch_change):
            continue
        if name == "global_batch_size":
            raise UserError(
                f"checkpoint {checkpoint} was written with train.global_batch_size {before} and this run has {now}: "
                "set it back, or add --allow-batch-change (from Python: allow_batch_change=True) to continue with "
                f"{now}"
            )
        if name == "optimizer":
            key = next(key for key in {**now, **before} if now.get(key) != before.get(key))
            raise UserError(
                f"checkpoint {checkpoint} holds the optimizer state of optimizer.{key} = {before.get(key)}, and this "
                f"run has {now.get(key)}: set it back, or start another run from these weights, with --init "
                f"{checkpoint} and {elsewhere}"
            )
        if name == "objective":
            raise UserError(
                f"checkpoint {checkpoint} was trained with the objective {before}, and this run has {now}: set "
                "train.objective (from Python: objective=) back, or start another run from these weights, with --init "
                f"{checkpoint} and {elsewhere}"
            )
        if name == "data":
            raise UserError(f"checkpoint {checkpoint} {_other_order(now, before)}, or choose {elsewhere}")
        if name == "model":
            before = _as_today(before)
            if (shape := _shape(now)) is not None and shape == _shape(before):
                continue
            differing = [
                f"model.{key} is {now.get(key)!r}, was {before.get(key)!r}"
                for key in {**now, **before}
                if now.get(key) != before.get(key) and key not in _FREE
            ]
            if not differing:
                continue
            raise UserError(
                f"checkpoint {checkpoint} belongs to another model ({'; '.join(differing)}): choose {elsewhere}"
            )
        raise UserError(
            f"checkpoint {checkpoint} was written with {name} {json.dumps(before)} and this run has {json.dumps(now)}: "
            f"continue with the same {name}, or choose {elsewhere}"
        )


# of runs of versions that had no other
_FIRST = {"optimizer": {"kind": "adamw", "frozen": "none"}, "objective": "classify"}

# Keys of the model that a run may change: what only its first weights depend on, and what regularises it.
_OF_FIRST_WEIGHTS = ("head_bias", "layer_scale")
_FREE = ("dropout", "drop_path", "drop_path_mode", "head_bias")
# And those that say what it computes, beside its numbers.
_BESIDE_SHAPE = {"image_size", "num_classes", "pool", "pos_embed", "pos_embed_at", "registers", "head", "activation",
                 "layer_norm_eps"}  # fmt: skip


def _shape(model: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the parameters of a section `model` are, however it spells them; None if this version does not know it."""
    try:
        config = ModelConfig.model_validate(model)
        if is_timm(config):
            return config.model_dump(include={"name", "image_size", "num_classes", "timm"})
        shape = resolve_shape(config)
    except (ValidationError, UserError):
        return None
    rest = config.model_dump(include=_BESIDE_SHAPE)
    return {**rest, "shape": shape, "layer_scale": config.layer_scale is not None}


def _as_today(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section `model` of a checkpoint, in today's spelling and with the defaults of keys that are newer than it."""
    try:
        return ModelConfig.model_validate(model).model_dump(mode="json")
    except ValidationError:  # a key or a value that no longer exists
        return model


def _other_order(now: dict[str, Any], before: dict[str, Any]) -> str:
    """Why the data cannot continue where a checkpoint stopped, and what would let it."""
    if now.get("subset") != before.get("subset"):
        sizes = ["all samples" if of.get("subset") is None else f"{of['subset']:,}" for of in (before, now)]
        return f"was written with {sizes[0]} in data.subset and this run has {sizes[1]}: set it back"
    for name in ("order", "window", "streams", "shuffle_buffer"):
        if now.get(name) != before.get(name):
            return f"was written with data.{name} {before.get(name)} and this run has {now.get(name)}: set it back"
    if len(now["sources"]) != len(before["sources"]):
        return (
            f"was written with {counted(len(before['sources']), 'source')} in data.train and this run has "
            f"{len(now['sources'])}: set them back"
        )
    for number, (new, old) in enumerate(zip(now["sources"], before["sources"], strict=True), start=1):
        which = f"source {number} of data.train" if len(now["sources"]) > 1 else "data.train"
        if new["index"] != old["index"]:
            return (
                f"was written with other shards in {which} (index {old['index']}) than it names now (index "
                f"{new['index']}): restore the shards"
            )
        if new["lanes"] != old["lanes"]:
            return (
                f"was written with {which} in {counted(old['lanes'], 'lane')} and data.lanes is {new['lanes']} now: "
                "set it back or leave it out"
            )
    weights = [[source["weight"] for source in sources] for sources in (before["sources"], now["sources"])]
    return f"was written with the weights {weights[0]} in data.train and they are {weights[1]} now: set them back"


def load_start(start: Start, checkpointer: Checkpointer, run: RunFolder, world: World) -> Start:
    """Loads the checkpoint that a run is to start from, if there is one; returns where it starts. Collective.

    A damaged one is reported, and the next older one is loaded in its place. Raises UserError if there is none.
    """
    while start.checkpoint is not None:
        try:
            checkpointer.load(start.checkpoint)
            return start
        except DamagedCheckpoint as damage:
            found, start = len(start.damaged), world.on_main(partial(_before, start, str(damage), checkpointer.store))
            if world.is_main:
                report_damage(run, start.damaged[found:], start.checkpoint)
    return start


def record_batch_change(run: RunFolder, start: Start) -> None:
    """Says on the terminal and among the run's events that the global batch changes, and what the run's length is now.

    Does nothing if it does not.
    """
    if start.batch_before is None:
        return
    now, before, step = start.state.batches.current, start.batch_before, start.step
    message = (
        f"train.global_batch_size is {now} from step {step} on, and was {before}: the run has "
        f"{counted(start.total_steps, 'step')} now"
    )
    print(message, flush=True)
    record_event(run, "batch_change", message, step=step, before=before, after=now, total_steps=start.total_steps)


def report_damage(run: RunFolder, damaged: Sequence[str], used: Checkpoint | None) -> None:
    """Says on the terminal and among the run's events what is wrong with checkpoints, and which is `used` instead."""
    for damage in damaged:
        message = f"{damage}: going back to {used}"
        say(f"warning: {message}")
        record_event(run, "checkpoint_damaged", message)


def _before(start: Start, damage: str, store: CheckpointStore) -> Start:
    """The same run from an older checkpoint of the store on; after a copy in memory, from its newest."""
    assert start.checkpoint is not None
    below = start.checkpoint.step + isinstance(start.checkpoint.store, MemoryStore)
    older = [checkpoint for checkpoint in usable_checkpoints(store) if checkpoint.step < below]
    checkpoint, state, damaged = newest_readable(older, (*start.damaged, damage))
    assert checkpoint is not None and state is not None  # newest_readable raises if damaged ones are all there is
    return replace(start.at(checkpoint, state), damaged=damaged, saves_first=False)
