"""The Vision Transformers whose sizes are measured, and at which batch sizes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One model at one resolution."""

    name: str  # "H/14" or, away from 224 pixels, "H/14@336"
    patch: int
    image: int  # pixels
    width: int
    heads: int
    mlp_dim: int
    depth: int
    batches: tuple[int, ...]  # images: what fills a large GPU first, then what leaves it half empty
    class_token: bool = True
    only: tuple[str, ...] = ()  # the operations measured at this size, all if empty

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return self.patches + self.class_token

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


# Dosovitskiy et al. 2021, Table 1. The model that the kernels are designed for comes first, since time may be limited.
GPU_SHAPES = (
    Shape("H/14", 14, 224, 1280, 16, 5120, 32, (64, 4)),
    Shape("B/16", 16, 224, 768, 12, 3072, 12, (256, 8)),
    Shape("L/16", 16, 224, 1024, 16, 4096, 24, (128, 8)),
    Shape("H/14@336", 14, 336, 1280, 16, 5120, 32, (32, 2)),
    # average pooling instead of a class token, so 256 tokens: what the tail of one more costs attention
    Shape("H/14 gap", 14, 224, 1280, 16, 5120, 32, (64,), class_token=False, only=("attention",)),
    # Zhai et al. 2022, Table 2: widths that are no multiple of 256
    Shape("g/14", 14, 224, 1408, 16, 6144, 40, (64,), only=("add_layer_norm", "layer_norm")),
    Shape("G/14", 14, 224, 1664, 16, 8192, 48, (64,), only=("add_layer_norm", "layer_norm")),
)
# What a CPU gets through: an even and an odd head dimension, a power of two of patches and one token more.
CPU_SHAPES = (
    Shape("Ti/16", 16, 224, 192, 3, 768, 12, (8,)),
    Shape("S/16", 16, 224, 384, 6, 1536, 12, (4,)),
)
QUICK_CPU_SHAPES = (
    Shape("Ti/16@64", 16, 64, 192, 3, 768, 12, (8,)),
    Shape("tiny/14@56", 14, 56, 160, 2, 640, 4, (4,)),
)
