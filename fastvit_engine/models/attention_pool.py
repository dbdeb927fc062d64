"""Multihead attention pooling (MAP head) of Zhai et al. 2022, under the parameter names of timm."""

import math

import torch
from torch import Tensor, nn

from fastvit_kernels import FusedLayerNorm, layer_norm_mlp
from fastvit_kernels.gathered import GatheredWhole
from fastvit_kernels.mlp import Activation
from fastvit_kernels.modules import Mlp


class AttentionPool(GatheredWhole):  # forward reads the parameters of norm and mlp
    """One learned query attends to the tokens; an MLP with a residual follows: [B, N, D] -> [B, D].

    Parameters: latent [1, 1, D] (the query before its projection), q.*, kv.*, proj.*, norm.*, mlp.fc1.*, mlp.fc2.*.
    """

    def __init__(self, width: int, heads: int, mlp_dim: int, activation: Activation, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.activation: Activation = activation
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = FusedLayerNorm(width, eps)
        self.mlp = Mlp(width, mlp_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        # The query is the same for every image: it is projected once.
        query = self.q(self.latent).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [1, H, 1, d]
        keys, values = self.kv(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, N, d] each
        scores = query @ keys.transpose(-2, -1) / math.sqrt(query.shape[-1])  # [B, H, 1, N]
        exact = torch.promote_types(scores.dtype, torch.float32)
        attended = scores.softmax(dim=-1, dtype=exact).to(values.dtype) @ values  # [B, H, 1, d]
        pooled = layer_norm_mlp(
            self.proj(attended.transpose(1, 2).flatten(2)),  # [B, 1, D]
            self.norm.weight,
            self.norm.bias,
            self.mlp.fc1.weight,
            self.mlp.fc1.bias,
            self.mlp.fc2.weight,
            self.mlp.fc2.bias,
            eps=self.norm.eps,
            activation=self.activation,
        )
        return pooled[:, 0]
