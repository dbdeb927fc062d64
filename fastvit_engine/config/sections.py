"""The typed configuration of a run: what can be set, what it defaults to, and where each value came from.

A recipe is a YAML file with the sections below; `--set section.key=value` goes over it. Every value remembers its
origin (default, recipe file and line, or the command line), which `fastvit config show` prints.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from fastvit_engine.duration import Duration


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Section):
    """A ViT by its paper name, "size/patch" (Dosovitskiy et al. 2021, Table 1)."""

    name: str = "B/16"  # size Ti, S, B, L, H, g, G and any patch size: "H/14", "B/8"
    image_size: int = Field(224, gt=0)  # pixels; the patch size must divide it
    num_classes: int = Field(1000, gt=0)
    pool: Literal["cls", "gap"] = "cls"  # class token, or mean of the patch tokens and no class token
    head: Literal["linear", "mlp"] = "linear"  # mlp: one tanh hidden layer, the paper's pretraining head
    activation: Literal["gelu", "gelu_tanh"] = "gelu"  # exact erf, or the tanh form of the official JAX weights
    dropout: float = Field(0.0, ge=0, lt=1)  # after every dense layer but qkv, and after the position embedding
    drop_path: float = Field(0.0, ge=0, lt=1)  # stochastic depth of the last block; grows linearly from 0
    layer_scale: float | None = None  # initial value of LayerScale; null leaves it out
    head_bias: float = 0.0  # initial bias of the classifier; -10 for sigmoid losses over many classes
    # Overrides of the size's own numbers, for small experiments.
    width: int | None = Field(None, gt=0)
    depth: int | None = Field(None, gt=0)
    heads: int | None = Field(None, gt=0)
    mlp_dim: int | None = Field(None, gt=0)


class DataSource(_Section):
    """One of several sources that training mixes."""

    shards: str  # as data.train
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)  # share of the samples, relative to the other sources
    index: str | None = None  # as data.index


def _kind_of_sources(value: Any) -> str:
    return "sources" if isinstance(value, list | tuple) else "pattern"


# Two tags, so that an error is about the form that was meant.
TrainShards = Annotated[
    Annotated[str, Tag("pattern")] | Annotated[tuple[DataSource, ...], Tag("sources"), Field(min_length=1)],
    Discriminator(_kind_of_sources),
]


class DataConfig(_Section):
    """WebDataset shards and how their images become training pixels."""

    train: TrainShards | None = (
        None  # a folder, a glob, a brace pattern, an index; or a list of {shards, weight, index}
    )
    eval: str | None = None  # likewise, but no list; null: no evaluation
    index: str | None = None  # of the shards; null: shards.index beside them, which is made where it is missing
    train_samples: int | None = Field(None, gt=0)  # what durations call an epoch; null: all that the shards hold
    image_key: str = "jpg;jpeg;png;webp"  # the first of these members that a sample has
    label_key: str = "cls"  # member with the class index as text, or a field of a JSON member: "json.labels"
    max_labels: int = Field(1, gt=0)  # classes that one image may have; several need loss.kind=sigmoid
    num_workers: int = Field(4, ge=0)  # decoding processes of each rank
    order: Literal["indexed", "stream"] = "indexed"  # stream: for gzipped shards and pipes, which have no index
    lanes: int | None = Field(None, gt=0)  # that an epoch is cut into; null: up to 256, by the number of samples
    window: int = Field(1024, gt=0)  # neighbouring samples that a lane permutes
    max_bad_share: float = Field(1e-3, ge=0, le=1)  # of samples without a usable image; more stop the run
    # For order: stream only.
    streams: int | None = Field(None, gt=0)  # parallel shard streams of the whole run; null: one a decoding process
    shuffle_buffer: int = Field(1024, ge=1)  # samples (undecoded) that each stream shuffles within
    crop: Literal["inception", "resize"] = "inception"  # training crop: random area and aspect ratio, or whole image
    crop_scale: tuple[float, float] = (0.05, 1.0)  # share of the image's area an inception crop takes
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # aspect ratio of an inception crop
    flip: bool = True  # mirror half of the training images
    eval_crop: float = Field(0.875, gt=0, le=1)  # evaluation: short side to image_size / eval_crop, then centre crop
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of pixels in [0, 1]; 0.5 and 0.5 give the paper's [-1, 1]
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    mixup: float = Field(0.0, ge=0)  # alpha of the Beta distribution of weights; 0: off
    cutmix: float = Field(0.0, ge=0)  # likewise; with both on, each pair of images takes either at random
    randaugment_ops: int = Field(0, ge=0)  # operations that RandAugment applies to each training image; 0: off
    randaugment_magnitude: float = Field(10.0, ge=0)  # their strength, on the paper's scale of 10
    cache: str | None = None  # folder on a local disk that remote shards are downloaded into; null: read by range
    cache_gb: float | None = Field(None, gt=0)  # the most that it may hold; null: no limit

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """What training reads, as a list."""
        if isinstance(self.train, str):
            return (DataSource(shards=self.train, index=self.index),) if self.train else ()
        return self.train or ()


class TrainConfig(_Section):
    objective: Literal["classify"] = "classify"  # what is learned: the labels
    duration: Duration = "90 epochs"
    global_batch_size: int = Field(4096, gt=0)
    micro_batch_size: int | None = Field(None, gt=0)  # most images a process takes at a time; null: as many as fit
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    grad_clip: float | None = Field(1.0, gt=0)  # global norm; null: off
    log_every: int = Field(50, gt=0)  # steps


class OptimizerConfig(_Section):
    """AdamW; weight decay is multiplied by the learning rate, as in PyTorch, and applies to matrices only."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)


class ScheduleConfig(_Section):
    kind: Literal["constant", "linear", "cosine", "rsqrt"] = "linear"
    warmup: Duration = "10000 steps"
    cooldown: Duration = "50000 steps"  # rsqrt only: linear decay to final_learning_rate at the end
    timescale: Duration = "10000 steps"  # rsqrt only: rate falls as sqrt(timescale / (step - warmup + timescale))
    final_learning_rate: float = Field(0.0, ge=0)


class LossConfig(_Section):
    kind: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: float = Field(0.0, ge=0, lt=1)


class EmaConfig(_Section):
    decay: float | None = Field(None, gt=0, lt=1)  # null: no moving average of the weights


class EvaluateConfig(_Section):
    every: Duration | None = None  # besides once at the end
    batch_size: int | None = Field(None, gt=0)  # images a process; null: the training micro-batch


class CheckpointConfig(_Section):
    every: Duration | None = "5000 steps"  # besides once at the end
    keep: int = Field(2, gt=0)  # newest checkpoints that stay
    keep_every: Duration | None = None  # those at multiples of this stay too
    keep_best: (  # and so does the best by this figure of the evaluation made at its step; null: none
        Literal["eval.top1", "eval.top5", "eval.loss", "eval_ema.top1", "eval_ema.top5", "eval_ema.loss"] | None
    ) = None
    path: str | None = None  # a folder or a URL such as s3://bucket/run; null: checkpoints/ in the run folder


class ZeroConfig(_Section):
    """DeepSpeed ZeRO: what is sharded over the processes, and what is kept in host memory."""

    stage: Literal["auto", 0, 1, 2, 3] = "auto"  # auto: the cheapest that fits, see `fastvit plan`
    offload: Literal["none", "optimizer", "all"] = "none"  # all: parameters too, stage 3 only


class HealthConfig(_Section):
    """When training goes back to its last checkpoint. A loss, gradient or weight that is not finite always makes it."""

    # A loss or gradient norm above median + spike_threshold * max(MAD, floor) of the last `spike_window` steps, see
    # `train.guard`; null: spikes are let pass.
    spike_threshold: float | None = Field(20.0, gt=0)
    spike_window: int = Field(100, ge=10)  # steps; spikes are looked for once so many are done
    max_rewinds: int = Field(3, ge=0)  # of the whole run; one more and it stops
    compare_replicas_every: int | None = Field(100, gt=0)  # steps; null: only before each checkpoint
    # Looks at each process's own gradients in every step, which names the rank of a fault that does not repeat. Costs
    # a small reduction a parameter and micro-batch. false: only after a fault without a name, for the rest of the job.
    watch_gradients: bool = False


class WatchdogConfig(_Section):
    """When processes that wait for each other give up and end, for a restart, and which of them are called slow."""

    timeout_seconds: float = Field(300.0, gt=0)  # without progress on any process, while training and evaluating
    slow_phase_seconds: float = Field(1800.0, gt=0)  # likewise while starting, in the first step, and while saving
    slow_rank_ratio: float = Field(1.5, gt=1)  # slow: own work that takes this many times the median process's
    slow_rank_laps: int = Field(3, gt=0)  # times in a row, five seconds apart or more, that it must be to be named


class Config(_Section):
    name: str = "run"
    seed: int = Field(0, ge=0)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    ema: EmaConfig = EmaConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    zero: ZeroConfig = ZeroConfig()
    health: HealthConfig = HealthConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    deepspeed: dict[str, Any] = {}  # merged last over the DeepSpeed configuration that the engine writes
