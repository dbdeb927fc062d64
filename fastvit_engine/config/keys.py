"""The keys of a configuration by their dotted names, and which of them an unknown name probably means."""

from collections.abc import Iterator
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fastvit_engine.config.near import near_names, or_list
from fastvit_engine.config.sections import Config, DataSource

SOURCES = "data.train"  # whose list form has keys of its own

MOVED = {  # former name: new name
    f"data.{key}": f"augment.{key}"
    for key in (
        "crop",
        "crop_scale",
        "crop_ratio",
        "flip",
        "mixup",
        "cutmix",
        "randaugment_ops",
        "randaugment_magnitude",
    )
}

_ALIASES = {  # words from other code bases, whatever section they are looked for in
    "optimizer.learning_rate": "lr base_lr max_lr peak_lr blr initial_lr",
    "optimizer.weight_decay": "wd decay l2",
    "optimizer.betas": "beta beta1 beta2 adam_betas opt_betas",
    "optimizer.eps": "epsilon adam_eps opt_eps",
    "optimizer.kind": "opt optim optimizer_name",
    "optimizer.momentum": "sgd_momentum",
    "optimizer.layer_decay": "layer_wise_lr_decay llrd layerwise_decay lr_decay_rate",
    "optimizer.frozen": "freeze freeze_backbone frozen_backbone linear_probe",
    "init.from": "finetune pretrained pretrained_model init_from load_from checkpoint_path resume_weights",
    "train.global_batch_size": "batch_size batchsize bs batch global_batch total_batch_size train_batch_size",
    "train.micro_batch_size": "micro_batch mini_batch_size batch_size_per_gpu per_device_batch_size "
    "accum_iter grad_accum grad_accum_steps accumulation_steps gradient_accumulation_steps",
    "train.duration": "epochs epoch num_epochs max_epochs total_epochs steps num_steps max_steps total_steps iters "
    "max_iters train_steps",
    "tokens.patch_drop": "patch_drop_rate token_drop patch_dropout mask_image_ratio",
    "tokens.image_sizes": "progressive_resizing image_size_schedule",
    "train.precision": "amp dtype mixed_precision bf16 fp16 fp8 float8 half autocast use_amp",
    "train.grad_clip": "clip_grad clip grad_clip_norm clip_grad_norm max_grad_norm max_norm gradient_clip_val",
    "train.compile": "torch_compile torchcompile compiled use_compile torchscript",
    "train.cuda_graph": "cuda_graphs use_cuda_graph cudagraph cudagraphs graph_capture",
    "train.activation_checkpointing": "grad_checkpointing gradient_checkpointing activation_checkpoint use_checkpoint "
    "checkpoint_activations remat",
    "train.log_every": "log_interval log_every_n_steps log_freq print_freq logging_steps",
    "schedule.warmup": "warmup_steps warmup_epochs warm_up lr_warmup warmup_iters num_warmup_steps",
    "schedule.kind": "sched scheduler lr_scheduler lr_schedule lr_scheduler_type",
    "schedule.final_learning_rate": "min_lr final_lr end_lr lr_min eta_min",
    "model.name": "arch architecture model_name backbone variant",
    "model.image_size": "img_size input_size imgsz image_res resolution crop_size size",
    "model.num_classes": "nb_classes n_classes classes num_labels nclasses",
    "model.pool": "global_pool pooling pool_type",
    "model.registers": "reg_tokens register_tokens num_register_tokens num_registers",
    "model.drop_path": "drop_path_rate stochastic_depth sd_prob droppath",
    "model.drop_path_mode": "drop_path_kind batch_subset_drop_path",
    "model.dropout": "drop drop_rate dropout_rate",
    "model.layer_scale": "init_values layerscale",
    "model.width": "dim embed_dim hidden_size hidden_dim",
    "model.depth": "layers num_layers n_layers num_hidden_layers",
    "model.heads": "num_heads n_heads num_attention_heads",
    "model.mlp_dim": "intermediate_size mlp_ratio",
    "loss.kind": "criterion loss_type bce",
    "loss.label_smoothing": "smoothing",
    "dino.prototypes": "out_dim dino_out_dim head_n_prototypes",
    "dino.local_views": "local_crops_number n_local_crops num_local_crops local_crops",
    "dino.local_size": "local_crops_size local_crop_size",
    "dino.local_scale": "local_crops_scale",
    "dino.global_scale": "global_crops_scale",
    "dino.teacher_temperature": "teacher_temp",
    "dino.student_temperature": "student_temp",
    "dino.centre_momentum": "center_momentum",
    "moco.outputs": "moco_dim",
    "moco.hidden_width": "moco_mlp_dim",
    "moco.temperature": "moco_t",
    "moco.frozen_patches": "stop_grad_conv1",
    "mae.mask_ratio": "masking_ratio",
    "mae.decoder_width": "decoder_embed_dim decoder_dim decoder_hidden_size",
    "mae.decoder_depth": "decoder_layers decoder_num_hidden_layers",
    "mae.decoder_heads": "decoder_num_heads decoder_num_attention_heads",
    "ema.decay": "ema model_ema ema_decay model_ema_decay moco_m momentum_teacher",
    "data.train": "data_path data_dir train_data train_dir train_path train_shards dataset shards data_root",
    "data.eval": "val val_data val_dir val_path valid validation eval_data eval_shards val_shards test",
    "data.num_workers": "workers num_data_workers dataloader_num_workers",
    "augment.randaugment_ops": "aa auto_augment randaugment randaug rand_augment",
    "augment.flip": "hflip horizontal_flip random_flip",
    "augment.crop_scale": "scale random_resized_crop",
    "augment.crop_ratio": "ratio aspect_ratio",
    "augment.mixup": "mixup_alpha",
    "augment.cutmix": "cutmix_alpha",
    "data.eval_crop": "crop_pct",
    "evaluate.every": "eval_every eval_interval eval_freq val_every val_interval eval_steps validate_every",
    "evaluate.batch_size": "eval_batch_size val_batch_size validation_batch_size",
    "checkpoint.every": "save_every save_interval save_freq checkpoint_every checkpoint_interval save_steps ckpt_every",
    "checkpoint.keep": "save_total_limit max_checkpoints keep_last",
    "checkpoint.path": "checkpoint_dir ckpt_dir save_dir",
    "observe.trackers": "wandb use_wandb mlflow trackio tensorboard report_to logger loggers tracker log_wandb",
    "observe.project": "wandb_project experiment_name project_name mlflow_experiment",
    "observe.prometheus_port": "prometheus metrics_port",
    "train.profile.steps": "profiler profile_steps torch_profiler",
    "zero.stage": "zero_stage",
    "zero.offload": "cpu_offload offload_optimizer",
}
_OPTIONS = {
    "--out": "out out_dir output output_dir run_dir log_dir",
    "--resume auto": "resume auto_resume resume_from",
    "--cpu-processes": "cpu_processes nproc nproc_per_node",
}
_MEANT = {word: key for key, words in (_ALIASES | _OPTIONS).items() for word in words.split()}


def sections() -> dict[str, type[BaseModel]]:
    """The sections by name, those in others too, and the entries of data.train's list form as "data.train"."""
    found: dict[str, type[BaseModel]] = {}
    for name, section in _sections_in(Config):
        found[name] = section
        found |= {f"{name}.{inner}": kind for inner, kind in _sections_in(section)}
        if name == SOURCES.partition(".")[0]:
            found[SOURCES] = DataSource
    return found


def _sections_in(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield name, field.annotation


def keys_of(model: type[BaseModel]) -> list[str]:
    """The keys of a section that hold values, not sections."""
    inner = {name for name, _ in _sections_in(model)}
    return [name for name in model.model_fields if name not in inner]


@cache
def fields() -> dict[str, FieldInfo]:
    """Every key that holds a value, by its dotted name, in the order of the sections."""
    inner = sections()
    found = {name: Config.model_fields[name] for name in keys_of(Config)}
    for section, model in inner.items():
        values = {name: model.model_fields[name] for name in keys_of(model)}
        found |= {f"{section}.{written_name(name, field)}": field for name, field in values.items()}
    return found


def written_name(name: str, field: FieldInfo) -> str:
    """The name of a field in a recipe: "from" is no name that Python takes."""
    return field.alias or name


def alternatives(annotation: Any) -> Iterator[Any]:
    """The members of a union, however it is nested or annotated; any other type alone."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from alternatives(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for member in get_args(annotation):
            yield from alternatives(member)
    else:
        yield annotation


def takes_text(name: str) -> bool:
    """Whether the value of key `name` is text, perhaps among other forms."""
    return any(kind is str or _is_words(kind) for kind in _kinds(name))


def takes_null(name: str) -> bool:
    return NoneType in _kinds(name)


def takes_list(name: str) -> bool:
    return any(get_origin(kind) is tuple for kind in _kinds(name))


def _kinds(name: str) -> list[Any]:
    field = fields().get(name)
    return [] if field is None else list(alternatives(field.annotation))


def _is_words(kind: Any) -> bool:
    return get_origin(kind) is Literal and all(isinstance(value, str) for value in get_args(kind))


def hint(unknown: str) -> str:
    """What to say after "unknown configuration key 'a.b'; "."""
    section, _, last = unknown.rpartition(".")
    meant = suggestions(unknown)
    if meant and meant[0].startswith("--"):
        return f"use the option {meant[0]} of the command"
    if meant:
        return f"did you mean {or_list(meant)}?"
    inner = sections()
    return f"valid: {', '.join(_names_in(inner.get(section, Config)))}"


def _names_in(section: type[BaseModel]) -> list[str]:
    return [written_name(name, field) for name, field in section.model_fields.items()]


def suggestions(unknown: str) -> list[str]:
    """The keys that an unknown one probably means, the likeliest first; or one option of the command line."""
    section, _, last = unknown.rpartition(".")
    word = last.lower().replace("-", "_")
    known = fields()
    if unknown in MOVED:
        return [MOVED[unknown]]
    if word in _MEANT:
        return [_MEANT[word]]
    if same := [name for name in known if name.rpartition(".")[2] == word]:
        return same[:3]
    inner = sections()
    beside = _names_in(inner[section]) if section in inner else [] if section else _names_in(Config)
    if near := near_names(word, beside, cutoff=0.5):
        return [f"{section}.{near[0]}" if section else near[0]]
    if near := near_names(unknown, list(known), cutoff=0.75):
        return near
    elsewhere = near_names(word, [name.rpartition(".")[2] for name in known], cutoff=0.75)
    return [name for name in known if name.rpartition(".")[2] in elsewhere][:3]
