"""What the `deepspeed` section may hold: keys that DeepSpeed reads, that act here, and that no other section owns."""

from collections.abc import Mapping
from typing import Any

from fastvit_engine.config.near import near_names, or_list
from fastvit_engine.errors import UserError

# DeepSpeed ignores top-level keys it does not know; these are the ones it reads, so that a typing error is caught.
_KNOWN = {
    "aio",
    "bf16",
    "comet",
    "comms_logger",
    "communication_data_type",
    "csv_monitor",
    "data_types",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "fp16",
    "gradient_allreduce_op",
    "gradient_predivide_factor",
    "log_level",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "tensorboard",
    "timers",
    "torch_autocast",
    "wall_clock_breakdown",
    "wandb",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
}
_OWNED = {  # dotted key: what to set instead
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "train.grad_clip",
    "optimizer": "the 'optimizer' section",
    "scheduler": "the 'schedule' section",
    "bf16.enabled": "train.precision",
    "fp16.enabled": "train.precision",
    "torch_autocast": "train.precision",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.offload_optimizer.device": "zero.offload",
    "zero_optimization.offload_param.device": "zero.offload",
}
_WITHOUT_EFFECT = {
    "activation_checkpointing": "the model does not recompute activations",
    "compile": "the engine does not compile the model",
    "checkpoint": "the engine writes its own checkpoints: see the 'checkpoint' section",
    "datastates_ckpt": "the engine writes its own checkpoints: see the 'checkpoint' section",
}


def check_deepspeed(section: Mapping[str, Any]) -> None:
    """Raises UserError for a key that DeepSpeed does not know, that another section owns, or that has no effect."""
    for dotted, owner in _OWNED.items():
        if _holds(section, dotted):
            raise UserError(f"deepspeed.{dotted} is written by the engine: set {owner} instead")
    for key in section:
        if key in _WITHOUT_EFFECT:
            raise UserError(f"deepspeed.{key} has no effect: {_WITHOUT_EFFECT[key]}; remove it")
        if key not in _KNOWN:
            near = near_names(key, sorted(_KNOWN))
            hint = f"did you mean {or_list(f'deepspeed.{name}' for name in near)}?" if near else None
            raise UserError(
                f"DeepSpeed does not know the key 'deepspeed.{key}'; {hint or 'it reads ' + ', '.join(sorted(_KNOWN))}"
            )


def _holds(section: Any, dotted: str) -> bool:
    for key in dotted.split("."):
        if not isinstance(section, Mapping) or key not in section:
            return False
        section = section[key]
    return True
