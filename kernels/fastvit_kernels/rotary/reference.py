"""Normalisation and rotation of queries or keys in plain PyTorch: the CPU path and the oracle."""

import torch
from torch import Tensor


def norm_and_rotate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sin: Tensor | None,
    cos: Tensor | None,
    prefix: int,
    interleaved: bool,
    rms: bool,
    eps: float,
) -> Tensor:
    """Of x [B, N, H, d], with sin and cos [N - prefix, d], in float32 up to the end."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if weight is not None:
        centred = wide if rms else wide - wide.mean(dim=-1, keepdim=True)
        wide = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps) * weight
        wide = wide if bias is None else wide + bias
    if sin is not None and cos is not None:
        rest = wide[:, prefix:]
        rotated = rest * cos[:, None] + turned(rest, interleaved) * sin[:, None]
        wide = torch.cat([wide[:, :prefix], rotated], dim=1)
    return wide.to(x.dtype)


def turned(x: Tensor, interleaved: bool) -> Tensor:
    """Each pair (a, b) of channels as (-b, a). Pairs are neighbours, or lie half a head apart."""
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
