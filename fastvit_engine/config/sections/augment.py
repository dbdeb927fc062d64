"""How training images are varied."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fastvit_engine.config.sections.base import AreaFraction, Section, ordered

Ratio = Annotated[float, Field(gt=0.01, le=100)]
CropKind = Literal["inception", "tensorflow", "resize"]


class AugmentConfig(Section):
    """How training images are varied. Evaluation is not affected."""

    crop: CropKind = "inception"
    """Training crop. inception: uniform area and log-uniform aspect ratio; tensorflow: as TensorFlow draws, resizes and
    decodes it in big_vision, with uniform height and aspect ratio, in more time; resize: the whole image."""

    crop_scale: Annotated[tuple[AreaFraction, AreaFraction], AfterValidator(ordered)] = (0.05, 1.0)
    """Smallest and largest area of an inception crop, as a fraction of the image's area."""

    crop_ratio: Annotated[tuple[Ratio, Ratio], AfterValidator(ordered)] = (3 / 4, 4 / 3)
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
