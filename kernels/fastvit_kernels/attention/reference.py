"""Multi-head self-attention in plain PyTorch: the CPU path and the oracle."""

import torch.nn.functional as F
from torch import Tensor


def attention(qkv: Tensor, dropout: float) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, N, d]
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)  # [B, H, N, d]
    return out.transpose(1, 2).flatten(2)  # [B, N, H*d]
