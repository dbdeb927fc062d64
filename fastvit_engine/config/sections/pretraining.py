"""The objectives that learn without labels."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fastvit_engine.config.sections.base import AreaFraction, Section, ordered


class MaeConfig(Section):
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


class MaskedPatchConfig(Section):
    """For train.objective: masked_patch, masked patch prediction (Dosovitskiy et al. 2021, appendix B.1.2).

    Of the chosen patches' embeddings 80 % become a mask token, 10 % that of another patch of the image, and 10 % stay.
    The layer that predicts them is saved in checkpoints, and left out of exports.
    """

    ratio: float = Field(0.5, gt=0, le=1)
    """Fraction of the patches of each image that is chosen to be corrupted and predicted."""

    target: Literal["mean", "grid", "pixels"] = "mean"
    """What is predicted of a chosen patch. mean: its mean colour in 512 classes, three bits a channel; grid: that of
    each of its 4 x 4 cells; pixels: all pixels, with a squared error."""


class DinoConfig(Section):
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

    global_scale: Annotated[tuple[AreaFraction, AreaFraction], AfterValidator(ordered)] = (0.4, 1.0)
    """Smallest and largest area of the two large crops, as a fraction of the image's area."""

    local_views: int = Field(8, ge=0, le=100)
    """Number of small crops besides, which the teacher does not see."""

    local_size: int = Field(96, gt=0, le=4096)
    """Height and width of the small crops in pixels. The patch size must divide it."""

    local_scale: Annotated[tuple[AreaFraction, AreaFraction], AfterValidator(ordered)] = (0.05, 0.4)
    """Smallest and largest area of the small crops."""

    blur: bool = True
    """Blur some of the views, by up to 2 pixels whatever their size: false is for images of few pixels."""


class MocoConfig(Section):
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

    crop_scale: Annotated[tuple[AreaFraction, AreaFraction], AfterValidator(ordered)] = (0.08, 1.0)
    """Smallest and largest area of the two crops, as a fraction of the image's area."""

    blur: bool = True
    """Blur some of the views, by up to 2 pixels whatever their size: false is for images of few pixels."""

    frozen_patches: bool = True
    """Leave the projection of patches as it is drawn: it does not learn, which makes the training of large models
    stable."""


Pretraining = DinoConfig | MaeConfig | MaskedPatchConfig | MocoConfig
