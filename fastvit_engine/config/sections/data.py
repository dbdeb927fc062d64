"""Which shards are read, and how."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from fastvit_engine.config.sections.base import Section
from fastvit_engine.config.subset import check_share_or_count, subset_size

PixelMean = Annotated[float, Field(ge=0, le=1)]
PixelDeviation = Annotated[float, Field(gt=0.002, le=1)]
EvalTransform = Literal["timm", "big_vision", "fast"]
BEFORE_EVAL_TRANSFORM: EvalTransform = "fast"  # of runs that are older than data.eval_transform


class DataSource(Section):
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


class DataConfig(Section):
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
    """Number of samples that durations count as one epoch; null: all samples of the training shards. With data.subset,
    the number that the shards hold."""

    subset: Annotated[int | float, BeforeValidator(check_share_or_count)] | None = None
    """Train on some of the samples only, and count those as an epoch: a share up to 1.0, with a decimal point, or a
    number of samples from 2 on; null: all. With the same seed, a smaller subset is part of a larger one. An epoch reads
    each sample of the subset exactly once. Needs order: indexed."""

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

    decoder: Literal["cpu", "nvjpeg"] = "cpu"
    """What decodes JPEGs in training. cpu: the decoding processes; nvjpeg: the GPU, through torchvision, for machines
    with few cores per GPU. Pixels differ a little. Evaluation, and JPEGs that are not baseline, stay on the CPU."""

    order: Literal["indexed", "stream"] = "indexed"
    """indexed: exact global shuffle with an index; stream: sequential reading, for gzipped shards and pipes."""

    lanes: int | None = Field(None, gt=0)
    """Equal parts into which an epoch is cut and from which batches are drawn in turn; null: up to 256, by the number
    of samples. An epoch drops fewer than this many samples, different ones every time; with data.subset, none."""

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
    def epoch_samples(self) -> int | None:
        """Samples of one epoch, if the configuration says so; None if only the shards do. Raises UserError."""
        if self.subset is None or self.train_samples is None:
            return self.subset if isinstance(self.subset, int) else self.train_samples
        return subset_size(self.train_samples, self.subset)

    @property
    def workers(self) -> int:
        """num_workers, and a number that suits a laptop if neither it nor the machine says how many."""
        return 4 if self.num_workers is None else self.num_workers
