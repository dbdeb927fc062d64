"""The numbers behind a model's name: width, depth, heads, patches. Needs no PyTorch: names are checked early."""

import re
from dataclasses import dataclass
from typing import Any

from fastvit_engine.config.resnet_shape import BIT_NAMES, HYBRID_NAMES, ResNetShape, bit_shape, hybrid_of, side
from fastvit_engine.config.sections import Config, DinoConfig, MaeConfig, MaskedPatchConfig, MocoConfig, ModelConfig
from fastvit_engine.duration import parse_duration
from fastvit_engine.errors import UserError

GRID_CELLS = 4  # rows and columns of a patch's cells, for masked_patch.target = grid
COLOURS = 512  # mean colours of three bits a channel


@dataclass(frozen=True)
class ModelSize:
    """The numbers behind a size such as "B"."""

    width: int
    depth: int
    heads: int
    mlp_dim: int


# Ti and S: Steiner et al. 2021; B, L, H: Dosovitskiy et al. 2021, Table 1; g, G: Zhai et al. 2022, Table 2;
# So400m: Alabdulmohsin et al. 2023 (arXiv:2305.13035), SoViT-400m.
SIZES = {
    "Ti": ModelSize(192, 12, 3, 768),
    "S": ModelSize(384, 12, 6, 1536),
    "B": ModelSize(768, 12, 12, 3072),
    "L": ModelSize(1024, 24, 16, 4096),
    "H": ModelSize(1280, 32, 16, 5120),
    "g": ModelSize(1408, 40, 16, 6144),
    "G": ModelSize(1664, 48, 16, 8192),
    "So400m": ModelSize(1152, 27, 16, 4304),
}


# Keys of a ResNet: it pools by the mean, its head is one linear layer, and its widths are those of its name.
_OF_RESNETS = {"name", "image_size", "num_classes", "head_bias"}


@dataclass(frozen=True)
class Shape:
    """The numbers of one model, after the name is parsed and the overrides are applied.

    A ResNet of BiT has no Transformer: its depth, heads and MLP are 0, its width is that of the last map, and the cells
    of that map are its patches.
    """

    patch_size: int  # in pixels
    patches: int  # of one image
    tokens: int  # patches, and before them the class token, if there is one, and registers
    positions: int  # rows of a position table: patches, and the class token if the table has a row for it
    width: int
    depth: int
    heads: int
    mlp_dim: int
    resnet: ResNetShape | None = None  # all there is of BiT; of a hybrid, what is before the patches

    @property
    def is_transformer(self) -> bool:
        """Whether there are blocks of attention: in all but the ResNets of BiT."""
        return self.depth > 0

    @property
    def is_hybrid(self) -> bool:
        """Whether a ResNet is before the Transformer."""
        return self.is_transformer and self.resnet is not None

    @property
    def patch_inputs(self) -> tuple[int, int, int]:
        """What a patch is projected from: channels, rows and columns, of pixels or of the map of a hybrid's ResNet."""
        if self.resnet is None:
            return 3, self.patch_size, self.patch_size
        cells = self.patch_size // 2**self.resnet.halvings
        return self.resnet.channels, cells, cells

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return self.tokens - self.patches


def resolve_shape(config: ModelConfig) -> Shape:
    """Reads the name ("H/14") and the overrides.

    Raises UserError naming the configuration key if they do not make a model.
    """
    if (resnet := bit_shape(config.name)) is not None:
        return _resnet_shape(config, resnet)
    size, patch_size, stem = _size_and_patch(config.name)
    if config.image_size % patch_size:
        within = f"the patch size {patch_size} in model.name" if stem is None else f"{patch_size} ({config.name})"
        raise UserError(f"model.image_size {config.image_size} is not a multiple of {within}")
    width, heads = config.width or size.width, config.heads or size.heads
    if width % heads:
        raise UserError(f"model.heads {heads} does not divide model.width {width}; set one of them to fit the other")
    _check_positions(config, width)
    patches = (config.image_size // patch_size) ** 2
    row_for_class_token = config.pool == "cls" and config.registers == 0 and config.pos_embed != "learned_2d"
    return Shape(
        patch_size=patch_size,
        patches=patches,
        tokens=patches + (config.pool == "cls") + config.registers,
        positions=patches + row_for_class_token,
        width=width,
        depth=config.depth or size.depth,
        heads=heads,
        mlp_dim=config.mlp_dim or width * size.mlp_dim // size.width,
        resnet=stem,
    )


def _check_positions(config: ModelConfig, width: int) -> None:
    """Raises UserError if there is no such position embedding."""
    if config.pos_embed == "sincos_2d" and (width % 4 or width < 8):
        raise UserError(f"model.pos_embed sincos_2d needs a model.width that is a multiple of 4 from 8 on, not {width}")
    if config.pos_embed == "learned_2d" and width % 2:
        raise UserError(f"model.pos_embed learned_2d needs an even model.width, half for columns and rows, not {width}")
    if config.pos_embed_at != "input" and config.pos_embed not in ("learned", "learned_2d"):
        raise UserError(
            f"model.pos_embed_at = {config.pos_embed_at} says where learned and learned_2d are added, and "
            f"model.pos_embed is {config.pos_embed}: set model.pos_embed_at=input, or model.pos_embed=learned"
        )


def _size_and_patch(name: str) -> tuple[ModelSize, int, ResNetShape | None]:
    """The size and the patch in pixels that a name stands for, and the ResNet of a hybrid. Raises UserError."""
    hybrid = hybrid_of(name)
    if hybrid is not None and hybrid.size in SIZES:
        return SIZES[hybrid.size], hybrid.patch_size, hybrid.resnet
    match = re.fullmatch(r"(\w+)/(\d+)", name)
    if match is None or match[1] not in SIZES or int(match[2]) == 0:
        if "+" in name or re.match(r"R\d+x", name):
            raise UserError(
                f"model.name '{name}' is no hybrid or ResNet that this version knows; hybrids: "
                f"{', '.join(HYBRID_NAMES)}; ResNets: {', '.join(BIT_NAMES)}"
            )
        raise UserError(f"model.name '{name}' is not a size and a patch size such as 'H/14'; sizes: {', '.join(SIZES)}")
    return SIZES[match[1]], int(match[2]), None


def _resnet_shape(config: ModelConfig, resnet: ResNetShape) -> Shape:
    for key in [key for key in ModelConfig.model_fields if key not in _OF_RESNETS]:
        default = ModelConfig.model_fields[key].default
        if (value := getattr(config, key)) != default:
            usual = "null" if default is None else default
            raise UserError(
                f"model.{key} = {value} is of Transformers, and model.name = {config.name} is a ResNet, which has no "
                f"such part: leave it out (model.{key}={usual})"
            )
    cells = side(config.image_size, resnet.halvings) ** 2
    return Shape(2**resnet.halvings, cells, cells, 0, resnet.channels, 0, 0, 0, resnet)


def smallest_image(name: str) -> int:
    """The smallest image that a model of this name takes, in pixels. Raises UserError if there is no such model."""
    return 1 if bit_shape(name) is not None else _size_and_patch(name)[1]


def tokens_in_training(config: Config) -> int:
    """Most tokens of an image that the blocks of the model see in training; for a model of timm, patches of 16 px."""
    if config.model.name.startswith("timm/"):
        return max(1, config.model.image_size // 16) ** 2
    shape, pretraining = resolve_shape(config.model), config.pretraining
    if isinstance(pretraining, DinoConfig):
        small = (pretraining.local_size // shape.patch_size) ** 2 + shape.prefix
        return 2 * shape.tokens + pretraining.local_views * small
    if isinstance(pretraining, MocoConfig):
        return 2 * shape.tokens
    if isinstance(pretraining, MaeConfig):
        return shape.tokens - masked_count(shape.patches, pretraining.mask_ratio)
    return shape.prefix + most_visible_patches(config, shape)


def most_visible_patches(config: Config, shape: Shape) -> int:
    """Most patches of an image that a run of `classify` sees: all, unless it drops some to its end."""
    tokens = config.tokens
    to_the_end = parse_duration(tokens.patch_drop_until) in ((100, "%"), parse_duration(config.train.duration))
    return visible_patches(shape.patches, tokens.patch_drop) if tokens.patch_drop and to_the_end else shape.patches


def drop_path_rates(config: ModelConfig, shape: Shape) -> list[float]:
    """The drop rate of each block: 0 in the first, `model.drop_path` in the last, linear between them."""
    return [config.drop_path * index / max(shape.depth - 1, 1) for index in range(shape.depth)]


def predicted_numbers(shape: Shape, masked_patch: MaskedPatchConfig) -> int:
    """Outputs that masked patch prediction has for each patch."""
    pixels = 3 * shape.patch_size**2
    return {"mean": COLOURS, "grid": COLOURS * GRID_CELLS**2, "pixels": pixels}[masked_patch.target]


def masked_count(patches: int, ratio: float) -> int:
    """How many of an image's patches self-supervised objectives hide."""
    return round(ratio * patches)


def visible_patches(patches: int, drop: float) -> int:
    """How many of an image's patches are left if this share of them is dropped: always one."""
    return max(1, patches - masked_count(patches, drop))


def model_title(config: ModelConfig) -> str:
    """The paper's name, with what differs from the size it names: "Ti/4, width 64, depth 4"; or timm's, likewise."""
    if config.timm:
        return ", ".join([config.name, *(f"{key} {value}" for key, value in config.timm.items())])
    overrides = {key: getattr(config, key) for key in ("width", "depth", "heads", "mlp_dim")}
    return ", ".join([config.name, *(f"{key} {value}" for key, value in overrides.items() if value is not None)])


def full_title(config: ModelConfig) -> str:
    """The title after the word for the family, if that does not say it: "ViT B/16", "timm/resnet18", "R50x1"."""
    says_it = config.name.startswith("timm/") or bit_shape(config.name) is not None
    return model_title(config) if says_it else f"ViT {model_title(config)}"


def model_of_shape(*, patch_size: int, width: int, depth: int, heads: int, mlp_dim: int) -> dict[str, Any]:
    """`name` of a section `model` with these numbers, and the keys that differ from the size that is the nearest."""
    numbers = {"width": width, "depth": depth, "heads": heads}
    found = []
    for name, size in SIZES.items():
        usual = {"width": size.width, "depth": size.depth, "heads": size.heads}
        keys: dict[str, Any] = {key: value for key, value in numbers.items() if value != usual[key]}
        if mlp_dim != width * size.mlp_dim // size.width:
            keys["mlp_dim"] = mlp_dim
        found.append({"name": f"{name}/{patch_size}"} | keys)
    return min(found, key=len)
