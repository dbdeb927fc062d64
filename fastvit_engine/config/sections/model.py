"""The model, and the weights that it starts from."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from fastvit_engine.config.sections.base import Section


class ModelConfig(Section):
    """The Vision Transformer, named as in the papers: size and patch size (Dosovitskiy et al. 2021, Table 1)."""

    name: Annotated[str, AfterValidator(lambda name: re.sub(r"^(R\d*\+)?ViT-", r"\1", name))] = "B/16"
    """Size and patch size, such as H/14 or B/8: Ti, S, B, L, H, g, G or So400m, and any patch size in pixels. A hybrid
    has a ResNet before it, R50+B/16: R50 at 16 or 32, R26 at 32, R at 16. A ResNet alone, R50x1, has 50, 101, 152 or
    200 layers and a factor of its widths; only image_size, num_classes and head_bias are for it.
    timm/NAME: a model of timm, such as timm/swin_tiny_patch4_window7_224, for which only image_size, num_classes,
    dropout, drop_path, head_bias and timm mean something. timm/MODULE:NAME: one that a Python module of your own
    registers, which is imported from the working directory or PYTHONPATH."""

    image_size: int = Field(224, gt=0, le=65536)
    """Height and width of the model's input in pixels. The patch size must divide it; a ResNet takes any."""

    num_classes: int = Field(1000, ge=0, le=10_000_000)
    """Number of classes, which is the number of outputs of the head. 0: no head, for training without labels and for
    weights that have none; such a model gives representations."""

    pool: Literal["cls", "gap", "map"] = "cls"
    """What the head sees. cls: the class token; gap: the mean of all patch tokens; map: what a learned query attends to
    among them, the attention pooling of Zhai et al. 2022. Models of gap and map have no class token."""

    pos_embed: Literal["learned", "none", "learned_2d", "relative", "sincos_2d"] = "learned"
    """Position embedding. learned: one vector per token; none: patches are a set; learned_2d: half a vector per column
    and half per row of patches; relative: in each block one vector per distance between two tokens, registers included,
    whose product with the query is added to the score of the key; sincos_2d: fixed sines and cosines of the rows and
    columns of patches, as in MoCo v3 and big_vision. With learned_2d the width must be even and with sincos_2d a
    multiple of four, and the class token has no position."""

    pos_embed_at: Literal["input", "every_layer", "shared"] = "input"
    """Where learned and learned_2d are added. input: to the input of the first block; every_layer: to that of each
    block, with a table of its own; shared: to that of each block, the same table."""

    registers: int = Field(0, ge=0, le=1024)
    """Number of register tokens (Darcet et al. 2024), which the blocks use and pooling leaves out. They come after the
    class token and have no vector of learned; with registers the class token has none either, as in timm."""

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

    drop_path_mode: Literal["mask", "subset"] = "mask"
    """How samples of a micro-batch are dropped from a branch. mask: each by a draw of its own, and what it would have
    added is computed and discarded; subset: as many as the rate says, rounded, drawn anew for each branch, and only the
    others are computed. A micro-batch of one image drops nothing then."""

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

    timm: dict[str, Any] = {}
    """Further arguments of `timm.create_model`, for a model of timm: {window_size: 8}."""

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # what a dictionary has none of


class InitConfig(Section):
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
