"""What `train.cuda_graph` cannot be combined with."""

from collections.abc import Mapping

from fastvit_engine.config.model_shape import Shape
from fastvit_engine.config.sections import Config, MocoConfig
from fastvit_engine.config.timm_model import is_timm
from fastvit_engine.errors import UserError


def check_cuda_graph(config: Config, shape: Shape | None) -> None:
    """Raises UserError if passes would be captured that change from step to step, or to no purpose.

    shape: of the model; None: it is not known yet, or a model of timm.
    """
    if not config.train.cuda_graph:
        return
    key, without = "train.cuda_graph = true", "train.cuda_graph=false"
    if is_timm(config.model) or (shape is not None and (shape.resnet is not None or not shape.is_transformer)):
        raise UserError(
            f"{key} is for this engine's Vision Transformers, whose passes read nothing back from the GPU, and "
            f"model.name is {config.model.name}: set {without}"
        )
    if config.zero.stage == 3 or config.zero.offload != "none":
        value = "stage = 3" if config.zero.stage == 3 else f"offload = {config.zero.offload}"
        raise UserError(
            f"{key} has the GPU repeat its work without the host, which zero.{value} needs within a step: set "
            f"zero.stage to 0, 1 or 2 and zero.offload=none, or {without}"
        )
    if config.train.compile:
        raise UserError(f"{key} captures a model as it is, and train.compile = true makes it another: set one of them")
    if config.train.activation_checkpointing not in ("auto", 0):
        raise UserError(
            f"{key} is for small micro-batches that leave memory free, and its backward pass cannot compute blocks "
            f"again, as train.activation_checkpointing = {config.train.activation_checkpointing} asks for: set "
            f"train.activation_checkpointing=0, or {without}"
        )
    if config.packing.on:
        raise UserError(
            f"{key} repeats passes of a few sizes, and packing.max_patches makes every micro-batch another size: set "
            f"{without}"
        )
    profiler = config.deepspeed.get("flops_profiler")
    if isinstance(profiler, Mapping) and profiler.get("enabled"):
        raise UserError(
            f"{key} repeats passes without calling the layers, which deepspeed.flops_profiler.enabled = true measures "
            f"one by one: set deepspeed.flops_profiler.enabled=false, or {without}"
        )
    if isinstance(config.pretraining, MocoConfig):
        raise UserError(
            f"{key}: train.objective = moco adds up statistics of all processes in the middle of a pass, which no "
            f"graph repeats: set {without}"
        )
