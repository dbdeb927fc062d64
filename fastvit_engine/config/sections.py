"""The typed sections of a configuration: every key with its type, range, default and meaning.

The string under a field is its documentation: `fastvit config explain` and docs/configuration.md print it. Say what the
value is, its unit, and what null means.
"""

import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fastvit_engine.duration import Duration


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, serialize_by_alias=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses true and false for a number: pydantic would take them for 1 and 0."""
        elements = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(element, bool) for element in elements) and _holds_numbers(cls, str(info.field_name)):
            raise ValueError("write a number, not true or false")
        return value


@cache
def _holds_numbers(section: type[BaseModel], name: str) -> bool:
    kinds = _types_in(section.model_fields[name].annotation)
    return bool({int, float} & kinds) and bool not in kinds


def _types_in(annotation: Any) -> set[Any]:
    """The types, and the values of a Literal as their types, that a nested annotation is made of."""
    arguments = get_args(annotation)
    if not arguments:
        return {annotation if isinstance(annotation, type) else type(annotation)}
    return set().union(*(_types_in(argument) for argument in arguments))


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("the first number must not be greater than the second")
    return pair


# Bounds are wide: they keep out what nobody means, and what would overflow, never end or fill the memory.
_MOST_SAMPLES = 2**20  # of one batch
_MONTH = 2_592_000.0  # seconds
MOST_PROFILED = 20  # steps
OBJECTIVES = ("classify", "dino", "mae", "masked_patch", "moco")  # of the engine
Ratio = Annotated[float, Field(gt=0.01, le=100)]
LearningRate = Annotated[float, Field(le=1e30)]  # finite in fp32, as are a few hundred updates
Decay = Annotated[float, Field(ge=0, lt=1)]
Shots = Annotated[int, Field(gt=0, le=1_000_000)]
Rank = Annotated[int, Field(ge=0, lt=1_000_000)]
AreaFraction = Annotated[float, Field(gt=0, le=1)]
PixelMean = Annotated[float, Field(ge=0, le=1)]
PixelDeviation = Annotated[float, Field(gt=0.002, le=1)]
TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
OptimizerName = Literal["adamw", "sgd", "lion", "muon", "lamb", "adafactor"]
EvalTransform = Literal["timm", "big_vision", "fast"]
CropKind = Literal["inception", "tensorflow", "resize"]
BEFORE_EVAL_TRANSFORM: EvalTransform = "fast"  # of runs that are older than data.eval_transform


class ModelConfig(_Section):
    """The Vision Transformer, named as in the papers: size and patch size (Dosovitskiy et al. 2021, Table 1)."""

    name: Annotated[str, AfterValidator(lambda name: name.removeprefix("ViT-"))] = "B/16"
    """Size and patch size, such as H/14 or B/8: Ti, S, B, L, H, g or G, and any patch size in pixels."""

    image_size: int = Field(224, gt=0, le=65536)
    """Height and width of the model's input in pixels. The patch size must divide it."""

    num_classes: int = Field(1000, ge=0, le=10_000_000)
    """Number of classes, which is the number of outputs of the head. 0: no head, for training without labels and for
    weights that have none; such a model gives representations."""

    pool: Literal["cls", "gap", "map"] = "cls"
    """What the head sees. cls: the class token; gap: the mean of all patch tokens; map: what a learned query attends to
    among them, the attention pooling of Zhai et al. 2022. Models of gap and map have no class token."""

    pos_embed: Literal["learned", "sincos_2d"] = "learned"
    """Position embedding. learned: one vector per token; sincos_2d: fixed sines and cosines of the rows and columns of
    patches, as in MoCo v3 and big_vision. The width must then be a multiple of four; a class token or registers have no
    position."""

    registers: int = Field(0, ge=0, le=1024)
    """Number of register tokens (Darcet et al. 2024), which the blocks use and pooling leaves out. They come after the
    class token and have no position; with registers the class token has none either, as in timm."""

    head: Literal["linear", "mlp"] = "linear"
    """linear: one linear layer; mlp: a hidden tanh layer before it, the paper's head for pretraining."""

    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    """Activation of the MLP. gelu: exact, with erf; gelu_tanh: the approximation that the official JAX weights use."""

    layer_norm_eps: float = Field(1e-6, gt=0, le=0.1)
    """What LayerNorm adds to the variance. Weights of Hugging Face's ViT usually have 1e-12."""

    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout rate after the position embedding and after every dense layer except the query, key, value projection."""

    drop_path: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth: drop rate of the last block. It grows linearly from 0 in the first block."""

    layer_scale: float | None = Field(None, ge=0, le=10)
    """Initial value of LayerScale; null: no LayerScale."""

    head_bias: float = Field(0.0, ge=-1000, le=1000)
    """Initial bias of the classifier. Use about -10 with a sigmoid loss over many classes."""

    width: int | None = Field(None, gt=0, le=65536)
    """Embedding dimension; null: the size's own. Use this and the next three keys for small experiments."""

    depth: int | None = Field(None, gt=0, le=10_000)
    """Number of transformer blocks; null: the size's own."""

    heads: int | None = Field(None, gt=0, le=65536)
    """Number of attention heads, which must divide the width; null: the size's own."""

    mlp_dim: int | None = Field(None, gt=0, le=1_000_000)
    """Hidden dimension of the MLP; null: in proportion to the width, as in the named size."""


class DataSource(_Section):
    """One of several sources that training mixes, if data.train is a list."""

    shards: str
    """The shards of this source: a folder, a glob, a brace pattern or an index."""

    weight: float = Field(1.0, gt=0, le=1e9)
    """Share of the training samples that come from this source, relative to the weights of the other sources."""

    index: str | None = None
    """Index of these shards, as data.index."""


def _kind_of_sources(value: Any) -> str:
    return "sources" if isinstance(value, list | tuple) else "pattern"


# Two tags, so that an error is about the form that was meant.
TrainShards = Annotated[
    Annotated[str, Tag("pattern")] | Annotated[tuple[DataSource, ...], Tag("sources"), Field(min_length=1)],
    Discriminator(_kind_of_sources),
]


class DataConfig(_Section):
    """Which shards (WebDataset tars) are read, in which order, and how their samples are decoded and normalised."""

    train: TrainShards | None = None
    """Training shards: a folder, a glob, a brace pattern or an index; or a list of sources to mix, see below."""

    eval: str | None = None
    """Evaluation shards: a folder, a glob, a brace pattern or an index; null: no evaluation. It measures accuracy and
    loss, and without labels the loss alone."""

    allow_overlap: bool = False
    """Allow the same shards in train and eval. Otherwise such a run is refused, since it measures nothing."""

    index: str | None = None
    """Index of the training shards, a file or a URL; null: shards.index beside them, which is made if it is missing."""

    train_samples: int | None = Field(None, gt=0, le=10**15)
    """Number of samples that durations count as one epoch; null: all samples of the training shards."""

    image_key: str = "jpg;jpeg;png;webp"
    """Extensions of the image member, separated by semicolons. The first one that a sample has is used."""

    label_key: str = "cls"
    """Member with the class index as text, or a field of a JSON member, such as json.labels."""

    max_labels: int = Field(1, gt=0, le=10_000)
    """Most classes that one image may have. More than one needs loss.kind: sigmoid."""

    soft_labels: bool | None = None
    """Learn the probabilities that a teacher has written beside the classes (`fastvit data label`); samples without any
    are learned by their class. false: learn the classes alone; null: refuse shards that have both."""

    num_workers: int | None = Field(None, ge=0, le=1024)
    """Decoding processes per rank; 0: decode in the training process; null: by the cores that each rank has."""

    order: Literal["indexed", "stream"] = "indexed"
    """indexed: exact global shuffle with an index; stream: sequential reading, for gzipped shards and pipes."""

    lanes: int | None = Field(None, gt=0)
    """Equal parts into which an epoch is cut and from which batches are drawn in turn; null: up to 256, by the number
    of samples. An epoch drops fewer than this many samples, different ones every time."""

    window: int = Field(1024, gt=0)
    """Number of neighbouring samples that are shuffled with each other within a lane."""

    max_bad_share: float = Field(1e-3, ge=0, le=1)
    """Abort when more than this fraction of samples cannot be decoded."""

    max_pixels: int = Field(178_956_970, gt=0, le=2 * 178_956_970)
    """Most pixels that an image may have. A sample with a larger image is bad, and its image is not decoded."""

    streams: int | None = Field(None, gt=0)
    """For order: stream. Number of shard streams that the run reads in parallel; null: one per decoding process."""

    shuffle_buffer: int = Field(1024, ge=1, le=10_000_000)
    """For order: stream. Number of undecoded samples that each stream shuffles within."""

    eval_crop: float = Field(0.875, ge=0.1, le=1)
    """Evaluation resizes the short side to image_size / eval_crop pixels, then takes the centre crop."""

    eval_transform: EvalTransform = "timm"
    """How evaluation resizes and crops. timm: exactly as timm does (antialiased bicubic); big_vision: exactly as
    big_vision does (area); fast: bilinear without antialiasing, in less time. Figures of different ones differ. A
    resumed run keeps its own unless this is set."""

    mean: tuple[PixelMean, PixelMean, PixelMean] = (0.5, 0.5, 0.5)
    """Mean per colour channel that normalising subtracts from pixels in [0, 1]. With std 0.5, 0.5 gives [-1, 1]."""

    std: tuple[PixelDeviation, PixelDeviation, PixelDeviation] = (0.5, 0.5, 0.5)
    """Standard deviation per colour channel that normalising divides by, for pixels in [0, 1]."""

    cache: str | None = None
    """Folder on a local disk into which remote shards are downloaded; null: remote shards are read by byte range."""

    cache_gb: float | None = Field(None, gt=0, le=1e9)
    """Most gigabytes that the cache may hold; null: no limit."""

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """What training reads, as a list."""
        if isinstance(self.train, str):
            return (DataSource(shards=self.train, index=self.index),) if self.train else ()
        return self.train or ()

    @property
    def workers(self) -> int:
        """num_workers, and a number that suits a laptop if neither it nor the machine says how many."""
        return 4 if self.num_workers is None else self.num_workers


class AugmentConfig(_Section):
    """How training images are varied. Evaluation is not affected."""

    crop: CropKind = "inception"
    """Training crop. inception: uniform area and log-uniform aspect ratio; tensorflow: as TensorFlow draws, resizes and
    decodes it in big_vision, with uniform height and aspect ratio, in more time; resize: the whole image."""

    crop_scale: Annotated[tuple[AreaFraction, AreaFraction], AfterValidator(_ordered)] = (0.05, 1.0)
    """Smallest and largest area of an inception crop, as a fraction of the image's area."""

    crop_ratio: Annotated[tuple[Ratio, Ratio], AfterValidator(_ordered)] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio (width / height) of an inception crop."""

    flip: bool = True
    """Mirror half of the training images."""

    mixup: float = Field(0.0, ge=0, le=1000)
    """Mixup: alpha of the Beta distribution of the mixing weight; 0: off. With cutmix on too, each pair of images gets
    one of the two at random."""

    cutmix: float = Field(0.0, ge=0, le=1000)
    """CutMix: alpha of the Beta distribution of the mixing weight; 0: off."""

    randaugment_ops: int = Field(0, ge=0, le=100)
    """RandAugment: number of operations applied to each training image; 0: off."""

    randaugment_magnitude: float = Field(10.0, ge=0, le=30)
    """RandAugment: strength of the operations, on the paper's scale of 10."""

    randaugment_policy: Literal["paper", "big_vision"] = "paper"
    """RandAugment: which operations. paper: the fourteen of its authors, as Pillow computes them; big_vision: the
    sixteen of big_vision, with its strengths, nearest pixels and cutout."""


def _as_text(steps: Any) -> Any:
    """One step, which YAML and Python write as a number, as text."""
    return str(steps) if type(steps) is int else steps


def _window(text: str) -> str:
    """Steps to profile, if they can be: they are recorded in memory."""
    first, last = profiled_steps(text)
    if not 1 <= first <= last:
        raise ValueError("the first step is 1, and the last must not come before the first")
    if last - first >= MOST_PROFILED:
        raise ValueError(f"at most {MOST_PROFILED} steps can be profiled")
    return text


def profiled_steps(text: str) -> tuple[int, int]:
    """The first and the last step of "100-105", or of "100"."""
    if re.fullmatch(r"[0-9]{1,18}(-[0-9]{1,18})?", text) is None:
        raise ValueError("write the first and the last step, such as 100-105, or one step")
    first, _, last = text.partition("-")
    return int(first), int(last or first)


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("name each one once")
    return values


def _objective(name: str) -> str:
    module, _, attribute = name.partition(":")
    if name not in OBJECTIVES and not all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
        raise ValueError(f"write {', '.join(OBJECTIVES)}, or MODULE:NAME for an objective of your own")
    return name


class ProfileConfig(_Section):
    """Some steps recorded by PyTorch's profiler, as a trace and as a table by kernel in profile/ of the run folder."""

    steps: Annotated[str, BeforeValidator(_as_text), AfterValidator(_window)] | None = None
    """First and last step to profile, such as 100-105, at most 20; or one step, such as 100; null: none."""

    ranks: Annotated[tuple[Rank, ...], AfterValidator(_distinct)] = Field((0,), min_length=1)
    """Processes to profile, by rank."""


class TrainConfig(_Section):
    """Length of the training, batch size, and numerical precision."""

    objective: Annotated[str, AfterValidator(_objective)] = "classify"
    """What training minimises. classify: the loss on the labels. mae: the error of a masked autoencoder, which predicts
    the pixels of hidden patches and needs no labels, see section mae. masked_patch: that of predicting the colours of
    corrupted patches, without labels, see section masked_patch. dino: what an average of the weights makes of other
    crops of the image, without labels, see section dino. moco: which of all images another crop is of, without labels,
    see section moco. MODULE:NAME: an objective of your own, a class or function in a Python module, which is imported
    from the working directory or PYTHONPATH."""

    duration: Duration = "90 epochs"
    """Length of the run: epochs, steps or samples."""

    global_batch_size: int = Field(4096, gt=0, le=_MOST_SAMPLES)
    """Images per optimizer step, over all processes."""

    micro_batch_size: int | None = Field(None, gt=0, le=_MOST_SAMPLES)
    """Most images that a process takes at a time; null: as many as fit into its memory."""

    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Number format of activations and gradients. Master weights and optimizer states are always fp32."""

    recompute: Literal["auto", "none", "gelu", "all"] = "auto"
    """What the backward pass of a fused block computes again instead of keeping it: nothing, the GELU, or both
    normalisations too. auto: as little as memory allows. Has no effect on plain PyTorch."""

    grad_clip: float | None = Field(1.0, gt=0, le=1e9)
    """Largest global norm of the gradient; null: no clipping."""

    log_every: int = Field(50, gt=0)
    """Steps between two rows of metrics."""

    profile: ProfileConfig = ProfileConfig()


class InitConfig(_Section):
    """The weights that a run starts from, read once, before its first step; a resumed run does not read them again.

    Keys of `model`, and `data.mean` and `data.std`, that the recipe leaves open come from there, but for num_classes.
    """

    from_: str | None = Field(None, alias="from")
    """A run folder, one of its checkpoints, or a file of weights; null: from scratch. A value of `model` that is given
    and contradicts it is refused; image_size and num_classes may differ."""

    head: Literal["new", "keep"] = "new"
    """new: one linear layer of zeros in place of the head and its tanh layer; keep: the head as it is, for the same
    classes."""

    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How the position embedding is resampled for another image_size. bilinear: as the authors' code, with corners
    aligned; bicubic: as DINOv2 and transformers."""


_OF_KIND: dict[str, dict[str, Any]] = {  # defaults that are not AdamW's
    "lion": {"betas": (0.9, 0.99)},
    "muon": {"momentum": 0.95},
    "lamb": {"eps": 1e-6},
    "adafactor": {"eps": 1e-30},
}


class OptimizerConfig(_Section):
    """What updates the weights. Weight decay is multiplied by the learning rate and applies to matrices only."""

    kind: OptimizerName = "adamw"
    """The optimizer. adamw: AdamW (Loshchilov and Hutter 2019); sgd: SGD with momentum; lion: Lion (Chen et al. 2023);
    muon: Muon for the matrices of the blocks (Jordan et al. 2024), AdamW for the rest; lamb: LAMB (You et al. 2020);
    adafactor: that of Zhai et al. 2022."""

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

    layer_decay: float | None = Field(None, gt=0, le=1)
    """Layer-wise decay d: the learning rate is multiplied by d^(depth + 1 - layer). The embeddings are layer 0, the
    first block is layer 1, and the final norm and the head, layer depth + 1, learn at the full rate; null: off."""

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


class ScheduleConfig(_Section):
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


class LossConfig(_Section):
    """The training loss."""

    kind: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: cross-entropy with one label per image; sigmoid: binary cross-entropy per class, for several labels."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Probability mass that is spread evenly over all classes; 0: off."""


class MaeConfig(_Section):
    """For train.objective: mae, a masked autoencoder (He et al. 2022).

    The model is the encoder, which sees the patches that are not hidden. The decoder predicts the pixels of the others.
    It is saved in checkpoints, and left out of exports.
    """

    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Fraction of the patches of each image that is hidden, others in every epoch."""

    decoder_width: int = Field(512, gt=0, le=65536)
    """Embedding dimension of the decoder, a multiple of four. Its MLPs are four times as wide."""

    decoder_depth: int = Field(8, gt=0, le=10_000)
    """Number of transformer blocks of the decoder."""

    decoder_heads: int = Field(16, gt=0, le=65536)
    """Number of attention heads of the decoder, which must divide its width."""


class MaskedPatchConfig(_Section):
    """For train.objective: masked_patch, masked patch prediction (Dosovitskiy et al. 2021, appendix B.1.2).

    Of the chosen patches' embeddings 80 % become a mask token, 10 % that of another patch of the image, and 10 % stay.
    The layer that predicts them is saved in checkpoints, and left out of exports.
    """

    ratio: float = Field(0.5, gt=0, le=1)
    """Fraction of the patches of each image that is chosen to be corrupted and predicted."""

    target: Literal["mean", "grid", "pixels"] = "mean"
    """What is predicted of a chosen patch. mean: its mean colour in 512 classes, three bits a channel; grid: that of
    each of its 4 x 4 cells; pixels: all pixels, with a squared error."""


class DinoConfig(_Section):
    """For train.objective: dino, self-distillation of several views (Caron et al. 2021).

    The teacher is the average of the weights: ema.decay is the momentum of the first step, and rises to 1 along half a
    cosine over the run. The projection is saved in checkpoints, and left out of exports.
    """

    prototypes: int = Field(65_536, gt=1, le=10_000_000)
    """Number of outputs, which the teacher sorts views into."""

    projection_width: int = Field(2048, gt=0, le=65536)
    """Width of the two hidden layers between the model and the bottleneck."""

    bottleneck: int = Field(256, gt=0, le=65536)
    """Dimension in which views are compared with prototypes."""

    student_temperature: float = Field(0.1, gt=0, le=100)
    """What the student's scores are divided by, before their softmax."""

    teacher_temperature: float = Field(0.04, gt=0, le=100)
    """What the teacher's are: a lower one sharpens its answers."""

    centre_momentum: float = Field(0.9, ge=0, lt=1)
    """Share of the centre, which is subtracted from the teacher's scores, that a step keeps."""

    global_scale: Annotated[tuple[AreaFraction, AreaFraction], AfterValidator(_ordered)] = (0.4, 1.0)
    """Smallest and largest area of the two large crops, as a fraction of the image's area."""

    local_views: int = Field(8, ge=0, le=100)
    """Number of small crops besides, which the teacher does not see."""

    local_size: int = Field(96, gt=0, le=4096)
    """Height and width of the small crops in pixels. The patch size must divide it."""

    local_scale: Annotated[tuple[AreaFraction, AreaFraction], AfterValidator(_ordered)] = (0.05, 0.4)
    """Smallest and largest area of the small crops."""

    blur: bool = True
    """Blur some of the views, by up to 2 pixels whatever their size: false is for images of few pixels."""


class MocoConfig(_Section):
    """For train.objective: moco, MoCo v3 (Chen et al. 2021): images are told apart by two views of each.

    The teacher is the average of the weights, as with dino. A step is computed at once, without micro-batches, as batch
    normalisation and the images to tell apart are of all images of the step. The projection and the predictor are saved
    in checkpoints, and left out of exports.
    """

    outputs: int = Field(256, gt=0, le=65536)
    """Dimension in which views are compared."""

    hidden_width: int = Field(4096, gt=0, le=65536)
    """Width of the hidden layers of the projection, which has two, and of the predictor, which has one."""

    temperature: float = Field(0.2, gt=0.001, le=100)
    """What similarities, between -1 and 1, are divided by before their softmax. The loss is multiplied by twice as
    much."""

    crop_scale: Annotated[tuple[AreaFraction, AreaFraction], AfterValidator(_ordered)] = (0.08, 1.0)
    """Smallest and largest area of the two crops, as a fraction of the image's area."""

    blur: bool = True
    """Blur some of the views, by up to 2 pixels whatever their size: false is for images of few pixels."""

    frozen_patches: bool = True
    """Leave the projection of patches as it is drawn: it does not learn, which makes the training of large models
    stable."""


class EmaConfig(_Section):
    """Moving average of the weights, which is evaluated and saved beside them."""

    decay: float | None = Field(None, gt=0, lt=1)
    """Decay rate per step of the exponential moving average; null: no average."""


class FewShotConfig(_Section):
    """Few-shot accuracy during training: a linear classifier on the model's features, as `fastvit fewshot` has it."""

    train: str | None = None
    """Shards whose images the classifiers are fitted to: a folder, a glob, a brace pattern or an index; null: no
    few-shot evaluation. Their classes need not be those of data.train."""

    eval: str | None = None
    """Shards of the same classes on which the classifiers are measured."""

    shots: tuple[Shots, ...] = Field((1, 5, 10, 25), min_length=1)
    """Numbers of images per class. Each is repeated with three choices of images."""

    every: Duration | None = None
    """Interval between few-shot evaluations; null: only at the end of the run, where one is always made. With
    optimizer.frozen: backbone, whose features stay the same, only there."""


class EvaluateConfig(_Section):
    """Evaluation during training on the shards of data.eval."""

    every: Duration | None = None
    """Interval between evaluations; null: only at the end of the run, where one is always made."""

    batch_size: int | None = Field(None, gt=0, le=_MOST_SAMPLES)
    """Images per process and forward pass; null: the training micro-batch."""

    fewshot: FewShotConfig = FewShotConfig()


class CheckpointConfig(_Section):
    """Which checkpoints are written, where, and which of them are kept."""

    every: Duration | None = "5000 steps"
    """Interval between checkpoints; null: only at the end of the run, where one is always written."""

    keep: int = Field(2, gt=0)
    """Number of most recent checkpoints to keep."""

    keep_every: Duration | None = None
    """Also keep the first checkpoint at or after each multiple of this interval; null: none."""

    keep_best: (
        Literal["eval.top1", "eval.top5", "eval.loss", "eval_ema.top1", "eval_ema.top5", "eval_ema.loss"] | None
    ) = None
    """Also keep the checkpoint with the best value of this evaluation metric; null: none."""

    path: str | None = None
    """Folder or URL for checkpoints, such as s3://bucket/run; null: checkpoints/ in the run folder."""


class ZeroConfig(_Section):
    """DeepSpeed ZeRO: what is sharded over the processes, and what is kept in host memory."""

    stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """0: nothing is sharded; 1: optimizer states; 2: gradients too; 3: parameters too; auto: the fastest stage that
    fits, see `fastvit plan`."""

    offload: Literal["none", "optimizer", "all"] = "none"
    """What is kept in host memory. optimizer: its states, from stage 1 on; all: parameters too, in stage 3 only."""


class HealthConfig(_Section):
    """When training returns to its last checkpoint. A loss, gradient or weight that is not finite always causes it."""

    spike_threshold: float | None = Field(20.0, gt=0, le=1e9)
    """A loss or gradient norm above median + spike_threshold x max(MAD, floor) of the last spike_window steps is a
    spike and rewinds the run (MAD: median absolute deviation); null: spikes are ignored."""

    spike_window: int = Field(100, ge=10, le=100_000)
    """Number of steps whose median and MAD are used. Detection starts after as many steps."""

    max_rewinds: int = Field(3, ge=0)
    """Most rewinds of the whole run. One more aborts it."""

    compare_replicas_every: int | None = Field(100, gt=0)
    """Steps between checks that all processes hold identical weights; null: only before each checkpoint."""

    watch_gradients: bool = False
    """Check each process's own gradients in every step, which names the rank at fault even if the fault never repeats.
    Costs a small reduction per parameter and micro-batch. false: only after a fault whose rank is unknown."""


class WatchdogConfig(_Section):
    """When processes stop waiting for each other and exit for a restart, and which of them are reported as slow."""

    timeout_seconds: float = Field(300.0, ge=1, le=_MONTH)
    """Exit after this many seconds without progress on any process, during training and evaluation."""

    slow_phase_seconds: float = Field(1800.0, ge=1, le=_MONTH)
    """The same limit while starting, in the first step, and while saving."""

    slow_rank_ratio: float = Field(1.5, gt=1, le=1e6)
    """A process is slow if its own work takes more than this many times the median process's."""

    slow_rank_laps: int = Field(3, gt=0)
    """Consecutive measurements, at least five seconds apart, in which a process must be slow to be reported."""


class ObserveConfig(_Section):
    """How a run can be watched while it trains, besides its log and the files of its folder."""

    trackers: Annotated[tuple[TrackerName, ...], AfterValidator(_distinct)] = ("tensorboard",)
    """Programs that draw the metrics, such as [tensorboard, wandb]; [] for none. All but tensorboard are packages of
    their own: pip install 'fastvit-engine[wandb]'."""

    project: str = Field("fastvit", min_length=1)
    """Project of wandb and trackio, and experiment of mlflow, in which the run appears under the name of its folder."""

    prometheus_port: int | None = Field(None, gt=0, lt=65536)
    """Port at which rank 0 serves the metrics to Prometheus; null: none. Needs pip install
    'fastvit-engine[prometheus]'."""

    prometheus_host: str = "127.0.0.1"
    """Address of that port. The default lets only this machine connect; 0.0.0.0: every machine that can reach it."""


class Config(_Section):
    """Everything that defines a run. `--set section.key=value` overrides one value."""

    name: str = "run"
    """Name of the run. Without --out, the run folder is runs/<name>."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the initial weights, the data order, augmentation and dropout."""

    model: ModelConfig = ModelConfig()
    init: InitConfig = InitConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    dino: DinoConfig = DinoConfig()
    mae: MaeConfig = MaeConfig()
    masked_patch: MaskedPatchConfig = MaskedPatchConfig()
    moco: MocoConfig = MocoConfig()
    ema: EmaConfig = EmaConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    zero: ZeroConfig = ZeroConfig()
    health: HealthConfig = HealthConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    observe: ObserveConfig = ObserveConfig()

    deepspeed: dict[str, Any] = {}
    """Further settings of DeepSpeed, merged over the configuration that the engine writes for it. Keys that another
    section owns, and keys that have no effect here, are refused."""

    @property
    def pretraining(self) -> "Pretraining | None":
        """The section of a self-supervised objective, which adds parameters to the model; None for other objectives."""
        sections: dict[str, Pretraining] = {
            "dino": self.dino,
            "mae": self.mae,
            "masked_patch": self.masked_patch,
            "moco": self.moco,
        }
        return sections.get(self.train.objective)


Pretraining = DinoConfig | MaeConfig | MaskedPatchConfig | MocoConfig
