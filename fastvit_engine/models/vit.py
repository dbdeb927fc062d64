"""The Vision Transformer of Dosovitskiy et al. 2021, under the parameter names of timm."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit_engine.config import EvalTransform, ModelConfig
from fastvit_engine.config.model_shape import resolve_shape
from fastvit_engine.models.attention_pool import AttentionPool
from fastvit_engine.models.positions import sincos_positions
from fastvit_kernels import FusedBlock, FusedLayerNorm, FusedPatchEmbed
from fastvit_kernels.mlp.op import Recompute
from fastvit_kernels.modules import Mlp


class VisionTransformer(nn.Module):
    """Images to logits: patches, position embedding, pre-norm blocks, final norm, pooling, head.

    Images are uint8 [B, H, W, 3] or [B, 3, H, W], normalised inside with `mean` and `std` of pixels in [0, 1], or
    floating [B, 3, H, W] that already are; H and W equal config.image_size. Weights are those of PyTorch's layers
    until `init_weights` is called; `build_vit` calls it.
    """

    backbone_frozen = False  # by `freeze_backbone`

    # How evaluation crops images, as data.eval_crop and data.eval_transform say it; None: nobody has said it.
    eval_crop: float | None = None
    eval_transform: EvalTransform | None = None
    class_names: tuple[str, ...] | None = None  # in the order of the outputs; None: not known

    def __init__(self, config: ModelConfig, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        shape = resolve_shape(config)
        width = shape.width
        self.config, self.shape = config, shape
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.pool == "cls" else None
        self.reg_token = nn.Parameter(torch.zeros(1, config.registers, width)) if config.registers else None
        self.pos_embed = nn.Parameter(
            torch.zeros(1, shape.positions, width), requires_grad=config.pos_embed == "learned"
        )
        self.patch_embed = FusedPatchEmbed(shape.patch_size, width, mean, std)
        self.pos_drop = nn.Dropout(config.dropout)
        self.blocks = Blocks(
            *(
                FusedBlock(
                    width,
                    shape.heads,
                    shape.mlp_dim,
                    activation=config.activation,
                    dropout=config.dropout,
                    drop_path=config.drop_path * index / max(shape.depth - 1, 1),
                    layer_scale=config.layer_scale,
                    eps=config.layer_norm_eps,
                )
                for index in range(shape.depth)
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

    def forward_features(self, images: Tensor) -> Tensor:
        """Normalised tokens of the last block [B, N, D]: the class token, if there is one, registers, patches."""
        return self.norm(self.blocks(self._embed(images)))

    def represent(self, images: Tensor) -> Tensor:
        """What the head sees of images [B, D]: pooled tokens, after the tanh layer if there is one.

        Where that is the class token, the last block gives this token alone, [B, 1, D], unless a hook is there to read
        the others.
        """
        if self.config.pool != "cls" or is_hooked(self.blocks, self.blocks[-1], self.norm):
            return self._pool(self.forward_features(images))
        return self._pool(self.norm(self.blocks(self._embed(images), outputs=1)))

    @torch.no_grad()
    def attention_maps(self, images: Tensor) -> Tensor:
        """The attention probabilities of every block, query by key: float32 [L, B, H, N, N], for inspection.

        Computed by plain layers beside the fused ones, without gradient. N^2 numbers per block, image and head: 2.4 MB
        per image and block of a B/16.
        """
        tokens = self._embed(images)
        maps = []
        for block in self.blocks:
            assert isinstance(block, FusedBlock)
            qkv = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, block.heads, -1)).float()  # [B, N, 3, H, d]
            queries, keys = (qkv[:, :, index].transpose(1, 2) for index in (0, 1))  # [B, H, N, d]
            maps.append((queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])).softmax(dim=-1))
            tokens = block(tokens)
        return torch.stack(maps)

    def forward_head(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> logits [B, C], from the tokens as `config.pool` pools them; without a head, [B, D]."""
        return self.head(self._pool(tokens))

    def _embed(self, images: Tensor, keep_indices: Tensor | None = None) -> Tensor:
        """The tokens that the first block gets [B, N, D]: of all patches, or of those that int64 [B, K] names."""
        positions = self._positions(images)
        if self.cls_token is not None and self.reg_token is not None:
            positions = F.pad(positions, (0, 0, 1, 0))  # zeros for the class token, which has no position then
        return self.pos_drop(self.patch_embed(images, positions, self.cls_token, self.reg_token, keep_indices))

    def _positions(self, images: Tensor) -> Tensor:
        """The position table for images of their size [1, N, D]."""
        table: Tensor = self.pos_embed
        return table

    def _pool(self, tokens: Tensor) -> Tensor:
        patches = tokens[:, self.shape.prefix :]
        if self.attn_pool is not None:
            pooled = self.attn_pool(patches)  # [B, D]
        else:
            pooled = tokens[:, 0] if self.config.pool == "cls" else patches.mean(dim=1)
        return pooled if self.pre_logits is None else self.pre_logits(pooled)

    def forward(self, images: Tensor) -> Tensor:
        if not self.backbone_frozen:
            return self.head(self.represent(images))
        with torch.no_grad():
            represented = self.represent(images)
        return self.head(represented)

    def recompute(self, mode: Recompute) -> None:
        """Sets what the backward pass of every block computes again instead of keeping it, see FusedBlock."""
        for block in self.modules():
            if isinstance(block, FusedBlock):
                block.recompute = mode

    def freeze_backbone(self) -> None:
        """From now on only `head` learns: all else gets no gradient, and computes as in evaluation, without dropout."""
        self.backbone_frozen = True
        self.requires_grad_(False)
        self.head.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> "VisionTransformer":
        super().train(mode)
        if self.backbone_frozen:
            for part in self.children():
                part.train(mode and part is self.head)
        return self

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
        if self.config.pos_embed == "learned":
            nn.init.normal_(self.pos_embed, std=0.02)
        else:
            self.pos_embed.copy_(sincos_positions(self.shape))
        for module in self.modules():
            if isinstance(module, FusedPatchEmbed):
                init_linear(module.proj, lecun_normal_)
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
    """Blocks one after the other, [B, N, D] -> [B, N, D], or [B, outputs, D] of the first `outputs` tokens."""

    def forward(self, x: Tensor, outputs: int | None = None) -> Tensor:
        *others, last = self
        for block in others:
            x = block(x)
        return last(x) if outputs is None else last(x, outputs=outputs)


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


def lecun_normal_(weight: Tensor) -> None:
    """Variance 1 / fan_in, drawn from a normal cut off at two of its own standard deviations."""
    cut_std = 0.87962566103423978  # of a standard normal cut off at +-2
    std = 1 / math.sqrt(weight[0].numel()) / cut_std
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def build_vit(config: ModelConfig, *, mean: Sequence[float], std: Sequence[float]) -> VisionTransformer:
    """An initialised model in float32; under torch.device("meta"), one of shapes only."""
    model = VisionTransformer(config, mean=mean, std=std)
    model.init_weights()
    return model
