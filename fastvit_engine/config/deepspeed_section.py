"""What the `deepspeed` section may hold: keys that DeepSpeed reads, that act here, and that no other section owns."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from fastvit_engine.config.near import near_names, or_list
from fastvit_engine.config.sections import Config
from fastvit_engine.errors import UserError

# The keys of DeepSpeed 0.19.8 that act here, and what each holds. int: 0 or more; float: finite, 0 or more.
_MONITOR = {"enabled": bool, "output_path": str, "job_name": str}
KEYS: dict[str, Any] = {
    "bf16": {"check_grad_overflow": bool, "immediate_grad_update": bool},
    "comet": {
        "enabled": bool,
        "samples_log_interval": int,
        "project": str,
        "workspace": str,
        "experiment_name": str,
        "experiment_key": str,
        "online": bool,
        "mode": str,
    },
    "comms_logger": {"enabled": bool, "prof_all": bool, "prof_ops": list, "verbose": bool, "debug": bool},
    "communication_data_type": str,
    "csv_monitor": _MONITOR,
    "data_types": {"grad_accum_dtype": str},
    "disable_python_gc": bool,
    "dump_state": bool,
    "flops_profiler": {
        "enabled": bool,
        "recompute_fwd_factor": float,
        "profile_step": int,
        "module_depth": int,
        "top_modules": int,
        "detailed": bool,
        "output_file": str,
    },
    "fp16": {
        "loss_scale": float,
        "initial_scale_power": int,
        "loss_scale_window": int,
        "hysteresis": int,
        "consecutive_hysteresis": bool,
        "min_loss_scale": int,
    },
    "gradient_predivide_factor": float,
    "log_level": str,
    "memory_breakdown": bool,
    "prescale_gradients": bool,
    "steps_per_print": int,
    "tensorboard": _MONITOR,
    "timers": {"throughput": {"enabled": bool, "synchronized": bool}},
    "wall_clock_breakdown": bool,
    "wandb": {"enabled": bool, "group": str, "team": str, "project": str},
    "zero_optimization": {
        "allgather_bucket_size": int,
        "allgather_partitions": bool,
        "contiguous_gradients": bool,
        "enable_sanity_checks": bool,
        "ignore_unused_parameters": bool,
        "leaf_module": {"classes": list, "names": list, "name_suffixes": list},
        "log_trace_cache_warnings": bool,
        "memory_efficient_linear": bool,
        "offload_optimizer": {"pin_memory": bool},
        "offload_param": {"pin_memory": bool},
        "overlap_comm": bool,
        "override_module_apply": bool,
        "parameter_alignment": bool,
        "reduce_bucket_size": int,
        "reduce_scatter": bool,
        "round_robin_gradients": bool,
        "stage3_allgather_sequential": bool,
        "stage3_max_live_parameters": int,
        "stage3_max_reuse_distance": int,
        "stage3_model_persistence_threshold": int,
        "stage3_module_granularity_threshold": int,
        "stage3_param_persistence_threshold": int,
        "stage3_prefetch_bucket_size": int,
        "stage3_use_all_reduce_for_fetch_params": bool,
        "sub_group_size": int,
        "use_multi_rank_bucket_allreduce": bool,
        "zero_hpz_partition_size": int,
        "zero_quantized_gradients": bool,
        "zero_quantized_nontrainable_weights": bool,
        "zero_quantized_weights": bool,
    },
}
_NOT_ZERO = {  # a bucket, a window or a divisor
    "fp16.loss_scale_window",
    "fp16.min_loss_scale",
    "gradient_predivide_factor",
    "zero_optimization.reduce_bucket_size",
}
_MOST = {"fp16.initial_scale_power": 32, "fp16.loss_scale": 2.0**32}
OWNED = {  # dotted key: what to set instead
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "managed_gradient_accumulation": "train.global_batch_size and train.micro_batch_size",
    "activation_checkpointing": "train.activation_checkpointing",
    "compile": "train.compile",
    "gradient_clipping": "train.grad_clip",
    "optimizer": "the 'optimizer' section",
    "scheduler": "the 'schedule' section",
    "amp": "train.precision",
    "bfloat16": "train.precision",
    "torch_autocast": "train.precision",
    "bf16.enabled": "train.precision",
    "bf16.bf16_master_weights_and_grads": "train.precision",
    "bf16.bf16_optimizer_states": "train.precision",
    "fp16.enabled": "train.precision",
    "fp16.auto_cast": "train.precision",
    "fp16.fp16_master_weights_and_grads": "train.precision",
    "data_types.param_dtype": "train.precision",
    "data_types.buffer_dtype": "train.precision",
    "data_types.keep_in_fp32_modules": "train.precision",
    "dataloader_drop_last": "the 'data' section",
    "data_efficiency": "the 'data' section",
    "zero_force_ds_cpu_optimizer": "zero.offload",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.cpu_offload": "zero.offload",
    "zero_optimization.cpu_offload_param": "zero.offload",
    "zero_optimization.cpu_offload_use_pin_memory": "zero.offload",
    "zero_optimization.offload_optimizer.device": "zero.offload",
    "zero_optimization.offload_param.device": "zero.offload",
}
_CHECKPOINTS = "the engine writes its own checkpoints: see the 'checkpoint' section"
_NO_NVME = "the engine offloads to host memory, not to NVMe: see zero.offload"
_REMOVED = "DeepSpeed 0.19.8 no longer has it"
WITHOUT_EFFECT = {  # dotted key: why
    "aio": _NO_NVME,
    "autotuning": "the engine chooses by itself: see `fastvit plan`",
    "checkpoint": _CHECKPOINTS,
    "datastates_ckpt": _CHECKPOINTS,
    "disable_allgather": "DeepSpeed 0.19.8 does not act on it",
    "gradient_allreduce_op": "the gradient of a step is the mean over its global batch",
    "hybrid_engine": "it is for generating text",
    "load_universal_checkpoint": _CHECKPOINTS,
    "pipeline": "the model is not cut into pipeline stages",
    "seq_parallel_communication_data_type": "sequences are not cut over processes",
    "sequence_parallel_size": "sequences are not cut over processes",
    "tensor_parallel": "layers are not cut over processes",
    "expert_parallel": "the model has no experts",
    "use_data_before_expert_parallelism": "the model has no experts",
    "vocabulary_size": "the model has no vocabulary",
    "weight_quantization": "the engine trains in train.precision",
    "zero_allow_untested_optimizer": "the engine's optimizers are made for ZeRO",
    **dict.fromkeys(
        (
            "nebula",
            "compression_training",
            "quantize_training",
            "sparse_gradients",
            "eigenvalue",
            "sparse_attention",
            "elasticity",
            "graph_harvesting",
            "curriculum_learning",
            "progressive_layer_drop",
            "zero_optimization.mics_shard_size",
            "zero_optimization.mics_hierarchical_params_gather",
            "zero_optimization.zeropp_loco_param",
        ),
        _REMOVED,
    ),
    "zero_optimization.compute_grad_norm": "the engine needs the norm of every gradient",
    "zero_optimization.elastic_checkpoint": _CHECKPOINTS,
    "zero_optimization.gather_16bit_weights_on_model_save": _CHECKPOINTS,
    "zero_optimization.legacy_stage1": _REMOVED,
    "zero_optimization.load_from_fp32_weights": _CHECKPOINTS,
    "zero_optimization.pipeline_loading_checkpoint": _CHECKPOINTS,
    "zero_optimization.save_muon_momentum_buffer_in_memory": "the engine's Muon is not DeepSpeed's",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _CHECKPOINTS,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _CHECKPOINTS,
    "zero_optimization.zenflow": "the engine updates all weights in every step",
    "zero_optimization.offload_optimizer.buffer_count": _NO_NVME,
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "the engine does not use SuperOffload",
    "zero_optimization.offload_optimizer.fast_init": _NO_NVME,
    "zero_optimization.offload_optimizer.nvme_path": _NO_NVME,
    "zero_optimization.offload_optimizer.pipeline_read": _NO_NVME,
    "zero_optimization.offload_optimizer.pipeline_write": _NO_NVME,
    "zero_optimization.offload_optimizer.ratio": "the engine offloads all states or none",
    "zero_optimization.offload_optimizer.super_offload": "the engine does not use SuperOffload",
    "zero_optimization.offload_param.buffer_count": _NO_NVME,
    "zero_optimization.offload_param.buffer_size": _NO_NVME,
    "zero_optimization.offload_param.max_in_cpu": _NO_NVME,
    "zero_optimization.offload_param.nvme_path": _NO_NVME,
}
SECRETS = {"comet.api_key": "COMET_API_KEY"}  # dotted key: the environment variable that Comet itself reads
_FLOAT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")  # which YAML 1.1 takes for text, but JSON does not


def check_deepspeed(config: Config) -> None:
    """Raises UserError for a key that DeepSpeed does not know, that another section owns, or that has no effect.

    Also for a secret, and for a value that the key cannot hold.
    """
    for dotted, value in _entries(config.deepspeed):
        _check_acts(dotted, config)
        _check_entry(dotted, value)


def as_numbers(section: Any) -> Any:
    """The section with the numbers of DeepSpeed's JSON, such as 5e8, in the place of text."""
    if isinstance(section, Mapping):
        return {key: as_numbers(value) for key, value in section.items()}
    if not isinstance(section, str) or not _FLOAT.fullmatch(section):
        return section
    number = float(section)
    return int(number) if number.is_integer() else number


def _entries(section: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each key of the section and of the mappings in it, dotted, with its value; an outer key before its inner ones."""
    for key, value in section.items():
        yield f"{prefix}{key}", value
        if isinstance(value, Mapping):
            yield from _entries(value, f"{prefix}{key}.")


def _check_acts(dotted: str, config: Config) -> None:
    if dotted in OWNED:
        raise UserError(f"deepspeed.{dotted} is written by the engine: set {OWNED[dotted]} instead")
    if dotted in WITHOUT_EFFECT:
        raise UserError(f"deepspeed.{dotted} has no effect: {WITHOUT_EFFECT[dotted]}; remove it")
    if dotted in SECRETS:
        raise UserError(
            f"deepspeed.{dotted} would be recorded with the run: set the environment variable {SECRETS[dotted]} instead"
        )
    section, _, inner = dotted.partition(".")
    if section in ("bf16", "fp16") and inner and _known(dotted) and config.train.number_format != section:
        raise UserError(
            f"deepspeed.{dotted} has no effect with train.precision = {config.train.precision}: remove it, or set "
            f"train.precision={section}"
        )
    for part, needed in (("offload_optimizer", ("optimizer", "all")), ("offload_param", ("all",))):
        if dotted.startswith(f"zero_optimization.{part}.") and _known(dotted) and config.zero.offload not in needed:
            raise UserError(
                f"deepspeed.{dotted} has no effect with zero.offload = {config.zero.offload}: remove it, or set "
                f"zero.offload={needed[0]}"
            )


def _check_entry(dotted: str, value: Any) -> None:
    outer, _, key = dotted.rpartition(".")
    kind = _known(dotted)
    if kind is None:
        beside = _known(outer) if outer else KEYS
        names = [f"{outer}.{name}" if outer else name for name in sorted(beside)]
        near = near_names(dotted, names, cutoff=0.75)
        hint = f"did you mean {or_list(f'deepspeed.{name}' for name in near)}?" if near else None
        raise UserError(
            f"DeepSpeed does not know the key 'deepspeed.{dotted}'; {hint or 'it reads ' + ', '.join(names)}"
        )
    if problem := _problem(dotted, kind, value):
        raise UserError(f"configuration key 'deepspeed.{dotted}' is {value!r}: {problem}")


def _known(dotted: str) -> Any:
    """What the key holds: a type, or a mapping of inner keys; None for a key that is not in KEYS."""
    found: Any = KEYS
    for part in dotted.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _problem(dotted: str, kind: Any, value: Any) -> str | None:
    """Why the key cannot hold the value, as what it must be; None if it can."""
    if value == "auto":
        return "leave it out, and the engine or DeepSpeed chooses"
    if isinstance(kind, Mapping):
        return None if isinstance(value, Mapping) else f"it must be a mapping of {', '.join(sorted(kind))}"
    if kind in (bool, str, list):
        words = {bool: "true or false", str: "text", list: "a list"}
        return None if isinstance(value, kind) else f"it must be {words[kind]}"
    noun = "an integer" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return f"it must be {noun}"
    if kind is int and value != int(value):
        return f"it must be {noun}"
    if dotted == "flops_profiler.module_depth" and value == -1:  # the innermost modules
        return None
    if value < 0 or (value == 0 and dotted in _NOT_ZERO):
        return f"it must be {noun} greater than 0" if dotted in _NOT_ZERO else f"it must be {noun}, 0 or more"
    if value > _MOST.get(dotted, 2**63 - 1):
        return f"it must be {noun} up to {_MOST.get(dotted, 2**63 - 1):.0f}"
    return None
