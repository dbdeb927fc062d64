"""Combinations of values that cannot work, whatever the data and the machine: refused before anything is loaded."""

from fastvit_engine.config.deepspeed_section import check_deepspeed
from fastvit_engine.config.model_shape import resolve_shape
from fastvit_engine.config.sections import Config, ZeroConfig
from fastvit_engine.duration import parse_duration
from fastvit_engine.errors import UserError


def check_config(config: Config) -> None:
    """Raises UserError, naming the keys, if two values of a valid configuration contradict each other."""
    resolve_shape(config.model)
    if config.data.max_labels > 1 and config.loss.kind == "softmax":
        raise UserError(
            f"data.max_labels is {config.data.max_labels}, and a softmax loss takes one label: set loss.kind=sigmoid"
        )
    if parse_duration(config.train.duration)[1] == "%":
        raise UserError(
            f"train.duration = '{config.train.duration}' is a fraction of the run and cannot be the length of the run "
            "itself: use steps, epochs or samples"
        )
    best = config.checkpoint.keep_best
    if best is not None and config.data.eval is None:
        raise UserError(f"checkpoint.keep_best = {best} needs an evaluation: set data.eval")
    if best is not None and best.startswith("eval_ema") and config.ema.decay is None:
        raise UserError(f"checkpoint.keep_best = {best} needs an average of the weights: set ema.decay")
    check_zero(config.zero)
    check_deepspeed(config.deepspeed)


def check_zero(zero: ZeroConfig) -> None:
    """Raises UserError if the stage cannot offload what zero.offload says. Stage auto is left to whoever chooses it."""
    if zero.offload != "none" and zero.stage == 0:
        raise UserError("zero.offload needs ZeRO: set zero.stage to 1, 2 or 3")
    if zero.offload == "all" and zero.stage not in (3, "auto"):
        raise UserError("zero.offload = all moves parameters to host memory, which needs zero.stage = 3")
