"""The Vision Transformer of Dosovitskiy et al. 2021, under the parameter names of timm."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastvit_engine.config import ModelConfig
from fastvit_engine.config.model_shape import drop_path_rates
from fastvit_engine.config.packing import check_packable
from fastvit_engine.models.activation_checkpointing import Checkpointing
from fastvit_engine.models.attention_pool import AttentionPool
from fastvit_engine.models.hybrid import HybridEmbed
from fastvit_engine.models.image_model import ImageModel
from fastvit_engine.models.initial import lecun_normal_
from fastvit_engine.models.packing import Packing, packed_positions
from fastvit_engine.models.positions import (
    TABLES,
    added_positions,
    init_learned,
    joined,
    relative_tokens,
    resampled,
    sincos_positions,
    table_shapes,
)
from fastvit_engine.packed_image import is_packed, read_grids
from fastvit_kernels import FusedBlock, FusedLayerNorm, FusedPatchEmbed
from fastvit_kernels.attention import relative_bias
from fastvit_kernels.modules import Mlp


class VisionTransformer(ImageModel):
    """Images to logits: patches, position embedding, pre-norm blocks, final norm, pooling, head.

    Patches are of pixels or, in a hybrid, of the map that a ResNet makes of an image. Images are as ImageModel says; H
    and W equal config.image_size, or one of `smaller_images`, for which positions are resampled. Images of different
    sizes are uint8 [B, K], see `packed_image`. Weights are those of
    PyTorch's layers until `init_weights` is called; `build_vit` calls it.
    """

    pos_embed: nn.Parameter | None  # [1 or L, N, D]
    pos_embed_x: nn.Parameter | None  # [1 or L, W, D/2]
    pos_embed_y: nn.Parameter | None  # [1 or L, H, D/2]
    smaller_images: frozenset[int] = frozenset()  # sizes in pixels that the model takes besides its own

    def __init__(self, config: ModelConfig, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(config, mean, std)
        shape, width = self.shape, self.shape.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.pool == "cls" else None
        self.reg_token = nn.Parameter(torch.zeros(1, config.registers, width)) if config.registers else None
        tables, learns = table_shapes(config, shape), config.pos_embed != "sincos_2d"
        for name in TABLES:
            table = nn.Parameter(torch.zeros(tables[name]), requires_grad=learns) if name in tables else None
            self.register_parameter(name, table)
        self.patch_embed = (
            FusedPatchEmbed(shape.patch_size, width, mean, std)
            if shape.resnet is None
            else HybridEmbed(shape, mean, std)
        )
        self.pos_drop = nn.Dropout(config.dropout)
        rates = drop_path_rates(config, shape)
        self.blocks = Blocks(
            *(
                FusedBlock(
                    width,
                    shape.heads,
                    shape.mlp_dim,
                    activation=config.activation,
                    dropout=config.dropout,
                    drop_path=rate,
                    drop_path_mode=config.drop_path_mode,
                    layer_scale=config.layer_scale,
                    eps=config.layer_norm_eps,
                    relative_tokens=relative_tokens(config, shape),
                )
                for rate in rates
            )
        )
        self.norm = FusedLayerNorm(width, config.layer_norm_eps)
        self.attn_pool = (
            AttentionPool(width, shape.heads, shape.mlp_dim, config.activation, config.layer_norm_eps)
            if config.pool == "map"
            else None
        )
        self.pre_logits = PreLogits(width) if config.head == "mlp" else None
        self.head = nn.Linear(width, config.num_classes) if config.num_classes else nn.Identity()

    def forward(self, images: Tensor, visible: Tensor | None = None, grids: np.ndarray | None = None) -> Tensor:
        """visible: int64 [B, K], the patches of each image that the model sees; None: all. grids: as in `represent`."""
        if visible is None:
            return super().forward(images) if grids is None else super().forward(images, grids=grids)
        if self.backbone_frozen:
            raise ValueError("a frozen backbone computes what it does in evaluation, of all patches: leave visible out")
        return self.head(self.represent(images, visible))

    def forward_features(self, images: Tensor) -> Tensor:
        """Normalised tokens of the last block [B, N, D]: the class token, if there is one, registers, patches."""
        return self._encode(images)

    def represent(self, images: Tensor, visible: Tensor | None = None, grids: np.ndarray | None = None) -> Tensor:
        """What the head sees of images [B, D]: pooled tokens, after the tanh layer if there is one.

        visible: as in `forward`.

        Where that is the class token, the last block gives this token alone, [B, 1, D], unless a hook is there to read
        the others. grids: of images of different sizes, what `read_grids` says, so that a GPU need not be waited for.
        """
        only_first = self.config.pool == "cls" and not is_hooked(self.blocks, self.blocks[-1], self.norm)
        if is_packed(images):
            return self._represent_packed(images, read_grids(images) if grids is None else grids, only_first)
        if not only_first:
            tokens = self.forward_features(images) if visible is None else self._encode(images, visible)
            return self._pool(tokens)
        return self._pool(self._encode(images, visible, outputs=1))

    @torch.no_grad()
    def attention_maps(self, images: Tensor) -> Tensor:
        """The attention probabilities of every block, query by key: float32 [L, B, H, N, N], for inspection.

        Computed by plain layers beside the fused ones, without gradient. N^2 numbers per block, image and head: 2.4 MB
        per image and block of a B/16.
        """
        positions = added_positions(self._tables(images), self.config, self.shape)
        tokens = self._embed(images, positions.at_input)
        maps = []
        for block, added in zip_longest(self.blocks, [None, *positions.later]):
            assert isinstance(block, FusedBlock)
            tokens = tokens if added is None else tokens + added
            qkv = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, block.heads, -1)).float()  # [B, N, 3, H, d]
            queries, keys = (qkv[:, :, index].transpose(1, 2) for index in (0, 1))  # [B, H, N, d]
            scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
            if block.attn.rel_pos_embed is not None:
                scores += relative_bias(qkv[:, :, 0], block.attn.rel_pos_embed.float())
            maps.append(scores.softmax(dim=-1))
            tokens = block(tokens)
        return torch.stack(maps)

    def checkpoint_blocks(self, count: int, *, offload: bool = False) -> None:
        """From now on the first `count` blocks keep their input alone for the backward pass, see `Checkpointing`."""
        self.blocks.checkpointing = Checkpointing(count, offload)

    def patch_positions(self) -> Tensor | None:
        """What is added to the patches at the input of the first block [N, D], row by row; None: nothing is."""
        tables = self._tables_of_parameters()
        return None if tables is None else tables[0, -self.shape.patches :]

    def forward_head(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> logits [B, C], from the tokens as `config.pool` pools them; without a head, [B, D]."""
        return self.head(self._pool(tokens))

    def _encode(self, images: Tensor, keep_indices: Tensor | None = None, outputs: int | None = None) -> Tensor:
        """Normalised tokens of the last block [B, N, D]: of all patches, or of those that int64 [B, K] names.

        outputs: only the first tokens, [B, outputs, D].
        """
        positions = added_positions(self._tables(images), self.config, self.shape, keep_indices)
        tokens = self._embed(images, positions.at_input, keep_indices)
        return self.norm(self.blocks(tokens, outputs=outputs, positions=positions.later))

    def _embed(self, images: Tensor, positions: Tensor | None, keep_indices: Tensor | None = None) -> Tensor:
        """The tokens that the first block gets [B, N, D]. positions, keep_indices: as in `patch_embed`."""
        return self.pos_drop(self.patch_embed(images, positions, self.cls_token, self.reg_token, keep_indices))

    def _represent_packed(self, images: Tensor, grids: np.ndarray, only_first: bool) -> Tensor:
        """As `represent`, of images uint8 [B, K] with grids int64 [B, 2], as one sequence of U tokens [1, U, D].

        only_first: the last block gives the first token of every image alone.
        """
        check_packable(self.config, self.shape)
        packing = Packing.of(grids, self.shape.prefix, images.device)
        x, y = self.pos_embed_x, self.pos_embed_y
        tables = self.pos_embed if x is None or y is None else (x, y)
        positions = packed_positions(tables, self.config, self.shape, packing)
        patches = self.patch_embed(packing.patches(images, self.shape.patch_size))[:, 0]  # [T, D]
        prefix = [token[0] for token in (self.cls_token, self.reg_token) if token is not None]
        before = torch.cat(prefix) if prefix else patches.new_empty(0, self.shape.width)  # [prefix, D]
        if positions:
            patches, before = patches + positions[0][0], before + positions[0][1]
        again = positions * (self.shape.depth - 1) if self.config.pos_embed_at == "shared" else positions[1:]
        later = [packing.joined(*of_layer) for of_layer in again]
        tokens = self.norm(
            self.blocks(
                self.pos_drop(packing.joined(patches, before)),
                outputs=1 if only_first else None,
                positions=later,
                lengths={"cu_seqlens": packing.cu_seqlens, "max_seqlen": packing.longest},
            )
        )
        if self.config.pool == "gap":
            pooled = packing.means_of_patches(tokens)
        else:
            pooled = tokens[0] if only_first else packing.first_tokens(tokens)
        return pooled if self.pre_logits is None else self.pre_logits(pooled)

    def _tables(self, images: Tensor) -> Tensor | None:
        """The position tables of the layers for images of their size [1 or L, N, D]; None: there are none."""
        tables, side = self._tables_of_parameters(), self.side(images)
        if tables is None or side * self.shape.patch_size not in self.smaller_images:
            return tables
        return resampled(tables, self.shape, side)

    def side(self, images: Tensor) -> int:
        """Rows, and columns, of the patches of such images."""
        return min(images.shape[1:3] if images.shape[-1] == 3 else images.shape[2:]) // self.shape.patch_size

    def _tables_of_parameters(self) -> Tensor | None:
        if self.pos_embed_x is not None and self.pos_embed_y is not None:
            return joined(self.pos_embed_x, self.pos_embed_y)
        return self.pos_embed

    def _pool(self, tokens: Tensor) -> Tensor:
        patches = tokens[:, self.shape.prefix :]
        if self.attn_pool is not None:
            pooled = self.attn_pool(patches)  # [B, D]
        else:
            pooled = tokens[:, 0] if self.config.pool == "cls" else patches.mean(dim=1)
        return pooled if self.pre_logits is None else self.pre_logits(pooled)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Sets every parameter as the authors' JAX code does, with Flax's initialisers.

        Dense kernels of the blocks are Xavier uniform, queries, keys and values each on its own; the head is zero, so
        that the first loss is that of `head_bias` alone. Whole parameters must be in memory: under ZeRO-3, call it
        inside deepspeed.zero.GatheredParameters.
        """
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=1e-6)  # equal ones would stay equal
        if self.config.pos_embed == "sincos_2d" and self.pos_embed is not None:
            self.pos_embed.copy_(sincos_positions(self.shape))
        else:
            for table in (self.pos_embed, self.pos_embed_x, self.pos_embed_y):
                if table is not None:
                    init_learned(table)
        for module in self.modules():
            if isinstance(module, FusedPatchEmbed):
                init_linear(module.proj, lecun_normal_)
            elif isinstance(module, HybridEmbed):
                module.init_weights()
            elif isinstance(module, FusedLayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, FusedBlock):
                init_block(module, self.config.layer_scale)
            elif isinstance(module, AttentionPool):
                init_attention_pool(module)
            elif isinstance(module, PreLogits):
                init_linear(module.fc, lecun_normal_)
        if isinstance(self.head, nn.Linear):
            init_linear(self.head, nn.init.zeros_, bias=self.config.head_bias)


class Blocks(nn.Sequential):
    """Blocks one after the other, [B, N, D] -> [B, N, D], or [B, outputs, D] of the first `outputs` tokens.

    positions: what is added to the input of each block after the first; of none if it is empty. lengths: cu_seqlens and
    max_seqlen of tokens [1, U, D] of several images, as FusedBlock takes them; `outputs` is then of each image.
    `checkpointing` says which blocks keep their input alone for the backward pass.
    """

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.checkpointing = Checkpointing()

    def forward(
        self,
        x: Tensor,
        outputs: int | None = None,
        positions: Sequence[Tensor] = (),
        lengths: Mapping[str, Any] = MappingProxyType({}),
    ) -> Tensor:
        for index, block in enumerate(self):
            if positions and index > 0:
                x = x + positions[index - 1]
            x = self.checkpointing(index, block, x, outputs if index == len(self) - 1 else None, **lengths)
        return x


def is_hooked(*modules: nn.Module) -> bool:
    """Whether a hook may read what these modules compute: not those of PyTorch and DeepSpeed, which move parameters."""
    return any(
        root_module(hook) not in ("torch", "deepspeed")
        for module in modules
        for kind in ("forward", "forward_pre", "backward", "backward_pre")
        for hook in getattr(module, f"_{kind}_hooks").values()
    )


def root_module(function: Any) -> str:
    """The package that a function, or what functools.partial made of it, comes from."""
    while isinstance(function, partial):
        function = function.func
    return (getattr(function, "__module__", None) or "").partition(".")[0]


class PreLogits(nn.Module):
    """The hidden layer of the paper's pretraining head: tanh(fc(x)), [B, D] -> [B, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x))


def init_linear(layer: nn.Linear | nn.Conv2d, init: Callable[[Tensor], object], bias: float = 0.0) -> None:
    init(layer.weight)
    if layer.bias is not None:
        nn.init.constant_(layer.bias, bias)


def init_block(block: FusedBlock, layer_scale: float | None) -> None:
    for projection in block.attn.qkv.weight.chunk(3):  # views [D, D] of the queries, keys and values
        nn.init.xavier_uniform_(projection)
    nn.init.zeros_(block.attn.qkv.bias)
    init_linear(block.attn.proj, nn.init.xavier_uniform_)
    init_mlp(block.mlp)
    if block.attn.rel_pos_embed is not None:
        init_learned(block.attn.rel_pos_embed)
    for scale in (block.ls1, block.ls2):
        if scale is not None and layer_scale is not None:
            nn.init.constant_(scale.gamma, layer_scale)


def init_attention_pool(pool: AttentionPool) -> None:
    nn.init.xavier_uniform_(pool.latent[0])  # [1, D]: one input for D outputs
    for projection in (pool.q.weight, *pool.kv.weight.chunk(2), pool.proj.weight):
        nn.init.xavier_uniform_(projection)
    for linear in (pool.q, pool.kv, pool.proj):
        nn.init.zeros_(linear.bias)
    init_mlp(pool.mlp)


def init_mlp(mlp: Mlp) -> None:
    for linear in (mlp.fc1, mlp.fc2):
        nn.init.xavier_uniform_(linear.weight)
        nn.init.normal_(linear.bias, std=1e-6)


def build_vit(config: ModelConfig, *, mean: Sequence[float], std: Sequence[float]) -> VisionTransformer:
    """An initialised model in float32; under torch.device("meta"), one of shapes only."""
    model = VisionTransformer(config, mean=mean, std=std)
    model.init_weights()
    return model
