"""Fewer tokens in a part of the training."""

from typing import Annotated

from pydantic import Field

from fastvit_engine.config.sections.base import Section
from fastvit_engine.duration import Duration

ImageSize = Annotated[int, Field(gt=0, le=65536)]


class TokensConfig(Section):
    """Fewer tokens in a part of the training, which makes its steps cheaper. Evaluation always sees whole images.

    For train.objective: classify, and models of this engine.
    """

    patch_drop: float = Field(0.0, ge=0, lt=1)
    """Share of the patches of each image that the model does not see in training, others in every epoch, as in FLIP (Li
    et al. 2023). Class token and registers stay."""

    patch_drop_until: Duration = "90%"
    """Point of the run, from its start, until which patches are dropped; the rest of the run sees all. 100%: to its
    end, which leaves evaluation to more tokens than the model has ever seen."""

    image_sizes: tuple[tuple[ImageSize, Duration], ...] = ()
    """Smaller images at first: pairs of a size in pixels and the point of the run, from its start, until which images
    have that size, such as [[128, 50%], [160, 75%]]; then they have model.image_size. Sizes and points rise. Learned
    positions are resampled for them. []: always model.image_size."""
