"""Images at their own proportions, several of them in one sequence."""

from pydantic import Field

from fastvit_engine.config.sections.base import Section

MOST_PATCHES = 2**16 - 1  # of one image, and so of its rows and columns


class PackingConfig(Section):
    """Native-resolution packing (Dehghani et al. 2023, NaViT): images keep their proportions.

    A crop is resized to whole patches, at most max_patches of them, instead of a square. All images of a micro-batch
    are one sequence of tokens without padding, in which each image attends to itself alone.
    """

    max_patches: int | None = Field(None, gt=0, le=MOST_PATCHES)
    """Most patches that an image is resized to, in training and in evaluation; at most as many as a square image of
    model.image_size has. null: no packing, all images are squares of model.image_size."""

    min_patches: int | None = Field(None, gt=0, le=MOST_PATCHES)
    """Draw the number of patches of each training image uniformly from here to max_patches, so that images come at
    random resolutions; null: always max_patches."""

    token_budget: int | None = Field(None, gt=0, le=10**9)
    """Most tokens of a micro-batch, class tokens and registers included: it has as many images as fit if all of them
    are as large as can be. Takes the place of train.micro_batch_size, and is refused with it. null: by
    train.micro_batch_size."""

    @property
    def on(self) -> bool:
        return self.max_patches is not None
