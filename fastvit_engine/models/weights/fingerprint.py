"""A short text that tells the weights of one model from those of another."""

from hashlib import blake2b

import torch
from torch import nn


def fingerprint(model: nn.Module) -> str:
    """The hash of all weights of a model, with their names, shapes and dtypes: 32 hexadecimal digits."""
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
