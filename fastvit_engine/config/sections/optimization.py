"""What updates the weights: optimizer, learning rate, loss, and their moving average."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fastvit_engine.config.sections.base import Section
from fastvit_engine.duration import Duration

LearningRate = Annotated[float, Field(le=1e30)]  # finite in fp32, as are a few hundred updates
Decay = Annotated[float, Field(ge=0, lt=1)]
OptimizerName = Literal["adamw", "sgd", "lion", "muon", "lamb", "adafactor"]
_OF_KIND: dict[str, dict[str, Any]] = {  # defaults that are not AdamW's
    "lion": {"betas": (0.9, 0.99)},
    "muon": {"momentum": 0.95},
    "lamb": {"eps": 1e-6},
    "adafactor": {"eps": 1e-30},
}


class OptimizerConfig(Section):
    """What updates the weights. Weight decay is multiplied by the learning rate and applies to matrices only."""

    kind: OptimizerName = "adamw"
    """The optimizer. adamw: AdamW (Loshchilov and Hutter 2019); sgd: SGD with momentum; lion: Lion (Chen et al. 2023);
    muon: Muon for the matrices of the blocks (Jordan et al. 2024), AdamW for the rest; lamb: LAMB (You et al. 2020);
    adafactor: that of Zhai et al. 2022."""

    kernels: Literal["torch", "apex"] = "torch"
    """What computes the update. torch: PyTorch, on GPUs with fused kernels for adamw and sgd; apex: FusedAdam for adamw
    or FusedLAMB for lamb of NVIDIA's apex, if it is installed, on GPUs only. Checkpoints of both are alike."""

    learning_rate: LearningRate = Field(1e-3, gt=0)
    """Peak learning rate, reached at the end of the warm-up."""

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of the averages of the gradient and of its square, for all but sgd; for muon of its AdamW. lion has
    one average: the first rate is that of its update, and the default (0.9, 0.99). adafactor averages updates at the
    first rate, and squares at the second at most."""

    eps: float = Field(1e-8, ge=1e-30, le=1)
    """For adamw, muon and lamb (default 1e-6): added to the denominator of the update; for adafactor (default 1e-30):
    added to the square of the gradient."""

    momentum: Decay = 0.9
    """For sgd: decay rate of the sum of the gradients; 0: no momentum. For muon (default 0.95): of their average."""

    weight_decay: float = Field(0.1, ge=0, le=1000)
    """Weight decay; 0: off. sgd: added to the gradient, before the momentum; lamb: added to the update before its
    length is set; others: decoupled from the gradient."""

    head_weight_decay: float | None = Field(None, ge=0, le=1000)
    """Weight decay of the classifier's matrix, whose features then suit few-shot learning better (Zhai et al. 2022);
    null: weight_decay."""

    layer_decay: float | None = Field(None, gt=0, le=1)
    """Layer-wise decay d: the learning rate is multiplied by d^(depth + 1 - layer). The embeddings are layer 0, the
    first block is layer 1, and the final norm and the head, layer depth + 1, learn at the full rate; null: off. A model
    of timm says itself what its layers are."""

    frozen: Literal["none", "backbone"] = "none"
    """What does not learn. backbone: all but the last linear layer, which is a linear probe. What is frozen computes as
    in evaluation, without dropout, and keeps every bit."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_kind(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        kind = values.get("kind")
        return {**(_OF_KIND.get(kind, {}) if isinstance(kind, str) else {}), **values}


class ScheduleConfig(Section):
    """The learning rate over the run."""

    kind: Literal["constant", "linear", "cosine", "rsqrt"] = "linear"
    """Shape of the curve after the warm-up. rsqrt: inverse square root, with a linear cooldown at the end."""

    warmup: Duration = "10000 steps"
    """Length of the linear warm-up from 0."""

    cooldown: Duration = "50000 steps"
    """For rsqrt: length of the linear decay to final_learning_rate at the end of the run."""

    timescale: Duration = "10000 steps"
    """For rsqrt: the rate falls as sqrt(timescale / (steps since warm-up + timescale))."""

    final_learning_rate: LearningRate = Field(0.0, ge=0)
    """Learning rate at the end of the run, for linear, cosine and rsqrt: at most optimizer.learning_rate."""


class LossConfig(Section):
    """The training loss."""

    kind: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: cross-entropy with one label per image; sigmoid: binary cross-entropy per class, for several labels."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Probability mass that is spread evenly over all classes; 0: off."""


class EmaConfig(Section):
    """Moving average of the weights, which is evaluated and saved beside them."""

    decay: float | None = Field(None, gt=0, lt=1)
    """Decay rate per step of the exponential moving average; null: no average."""
