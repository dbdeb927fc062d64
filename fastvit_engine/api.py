"""What the commands do, as functions: `fastvit_engine.train` and `fastvit_engine.evaluate`."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastvit_engine.config import Config, Resolved, load_config
from fastvit_engine.data import Batch, IterableData
from fastvit_engine.data.shards.names import about_teacher, info_beside
from fastvit_engine.data.stream.bad_samples import checked
from fastvit_engine.data.stream.iterable import Samples
from fastvit_engine.data.stream.prepare import eval_streams
from fastvit_engine.distributed.environment import launched_by_cluster
from fastvit_engine.distributed.supervise import free_port, rank_environment
from fastvit_engine.engine.deepspeed import forget_process_groups
from fastvit_engine.errors import UserError
from fastvit_engine.evaluate.class_lists import check_names
from fastvit_engine.evaluate.classification import Accuracy
from fastvit_engine.evaluate.classification import evaluate as evaluate_batches
from fastvit_engine.evaluate.one_pass import workers_for
from fastvit_engine.evaluate.own import Measure, check_evaluators
from fastvit_engine.models import AnyModel
from fastvit_engine.objectives import ObjectiveFactory, import_path
from fastvit_engine.observe.run_folder import run_folder
from fastvit_engine.shown import say
from fastvit_engine.train import loop
from fastvit_engine.trusted_folders import trust_compiled_code
from fastvit_kernels import FusedCrossEntropy

_SAME_CLASSES = "evaluate on shards of its classes, or set model.class_names = None if only the spelling differs"


def train(
    config: Resolved | Config | str,
    out: str | Path,
    *,
    resume: bool = False,
    allow_batch_change: bool = False,
    data: str | Path | Samples | IterableData | None = None,
    objective: ObjectiveFactory | None = None,
    evaluators: Mapping[str, Measure] | None = None,
) -> None:
    """Trains a model into the run folder `out`, in this process: `load_model(out)` then gives the model.

    It is the only process, on the first GPU or the CPU; or one of many, if torchrun or its like started it as one. Call
    it on the main thread: SIGTERM and Ctrl-C let it finish the step and save.

    config: what `load_config` returns, or a Config, or the name or path of a recipe.
    resume: continue from the latest checkpoint of `out`, if any; without, a folder that holds a run is refused.
    allow_batch_change: continue although `train.global_batch_size` is not what it was. The order of samples continues,
    and what has a length in epochs or samples keeps it.
    data: what to train on, in place of `data.train` of the configuration: shards; or an iterable of your own, such as a
    WebDataset pipeline, or a function that makes one. See `fastvit_engine.data.IterableData` for what it must yield,
    and for what a resumed run can promise then.
    objective: what to minimise, in place of `train.objective` of the configuration. A class or function at the top
    level of a module, which each rank calls with the Config and the device, and which returns an object with the method
    of `fastvit_engine.objectives.Objective`. The run records its module and name; a resume with another is refused.
    evaluators: what else to measure, by name: functions that take the model, in evaluation mode and without gradients,
    and return numbers by name. Every rank calls them every `evaluate.every` and after the last step, also with the
    average of the weights if there is one. The numbers of rank 0 become rows of `metrics.jsonl`.

    out: a path, or a URL of an object store, whose records are kept in a working folder on this machine meanwhile.

    Raises UserError, with a sentence on what to change, for anything that cannot work; Preempted if it was asked to
    stop, after it has saved.
    """
    resolved, run = _resolved(config), run_folder(out)
    own = None
    if data is not None:
        shards = None
        if isinstance(data, str | Path):
            shards = str(data)
        else:
            own = data if isinstance(data, IterableData) else IterableData(data)
        resolved = _changed(resolved, "data", train=shards, index=None)
    if objective is not None:
        resolved = _changed(resolved, "train", objective=import_path(objective))
    if dist.is_initialized():
        raise UserError(
            "this process already belongs to a process group of torch.distributed, and train() makes its own: destroy "
            "yours first, or call train() in a process that has none"
        )
    check_evaluators(evaluators or {})
    with nullcontext() if launched_by_cluster() else _lone_rank():
        loop.train(
            resolved,
            run,
            resume=resume,
            data=own,
            allow_batch_change=allow_batch_change,
            make_objective=objective,
            evaluators=evaluators,
        )


def evaluate(
    model: AnyModel,
    data: str | Path,
    *,
    config: Resolved | Config | str | None = None,
    batch_size: int = 64,
) -> Accuracy:
    """Measures a model on every image of some shards, in this process and on the model's device.

    model: as `load_model` or `build_model` returns it. data: shards, as `data.eval` of a configuration takes them.
    config: whose section `data` says how images and labels are read, and whose `loss` is measured. Default: one label
    per image, cropped as the run that trained the model did. batch_size: images at a time.

    Samples without a usable image are left out, and a line on stderr says how many. Raises UserError if they are more
    than `data.max_bad_share` allows, or all; and if the data cannot be read, or does not fit the model. It does not if
    `model.class_names` and the `dataset.json` beside the shards name different classes.
    """
    trust_compiled_code()
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: give the number of images at a time, 1 or more")
    if model.config.num_classes == 0:
        raise UserError(
            "the model has no head (num_classes is 0), so it has no classes to measure: load it with a head"
        )
    settings = Config() if config is None else _resolved(config).config
    changes: dict[str, Any] = {"eval": str(data), "order": "stream", "num_workers": workers_for(settings)}
    if config is None and model.eval_crop is not None:
        changes |= {"eval_crop": model.eval_crop, "eval_transform": model.eval_transform}
    settings = settings.model_copy(update={"model": model.config, "data": settings.data.model_copy(update=changes)})
    batches = _eval_batches(settings, batch_size, model.class_names)
    return evaluate_batches(model, batches, FusedCrossEntropy(settings.loss.kind))[0]


def _eval_batches(config: Config, batch_size: int, class_names: Sequence[str] | None) -> Iterator[Batch]:
    """Reads the shards of `data.eval` from beginning to end, which needs no index. class_names: of the model."""
    shards = eval_streams(config)
    assert shards is not None  # `evaluate` sets data.eval
    info = info_beside(list(shards.shards))
    check_names(class_names, None if info is None else info.classes, _SAME_CLASSES)
    for clause in about_teacher(info, str(config.data.eval)):
        say(f"note: {clause}", file=sys.stderr)
    pin_memory = torch.cuda.is_available()
    batches = shards.eval_batches(config, rank=0, world_size=1, batch_size=batch_size, pin_memory=pin_memory)
    return checked(batches, config.data.max_bad_share)


def _resolved(config: Resolved | Config | str) -> Resolved:
    if isinstance(config, Resolved):
        return config
    return Resolved(config) if isinstance(config, Config) else load_config(config)


def _changed(resolved: Resolved, section: str, **values: Any) -> Resolved:
    """The configuration with values that are arguments of `train`."""
    changed = getattr(resolved.config, section).model_copy(update=values)
    origins = {**resolved.origins, **{f"{section}.{key}": "train()" for key in values}}
    return Resolved(resolved.config.model_copy(update={section: changed}), origins)


@contextmanager
def _lone_rank() -> Iterator[None]:
    """Makes this process the only rank of a job, and none again after it."""
    before = dict(os.environ)
    os.environ.update(rank_environment(rank=0, processes=1, port=free_port()))
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    try:
        yield
    finally:
        if dist.is_initialized():  # after an error, which leaves no time for an orderly end in a job of many
            dist.destroy_process_group()
        forget_process_groups()
        os.environ.clear()
        os.environ.update(before)
