"""Random numbers that are a pure function of a sample's seed, for a whole batch at once."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: np.ndarray, count: int, *, stream: int) -> np.ndarray:
    """float64 [B, count] in [0, 1) for int64 seeds [B]; each purpose has a `stream` number of its own.

    SplitMix64 (Steele et al. 2014) as a counter-based generator: number i of a sample is the hash of (seed, stream, i).
    """
    base = _mix(seeds.astype(np.uint64) ^ _mix(np.uint64(stream) + _GOLDEN))  # [B]
    counter = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    return (_mix(base[:, None] + counter[None, :]) >> np.uint64(11)) * 2.0**-53


def sample_seeds(seed: int, *address: np.ndarray | int) -> np.ndarray:
    """int64 [B]: a seed for each of B samples from the seed of the run and numbers (each [B], or one for all)."""
    hashed = _mix(np.atleast_1d(np.asarray(seed % 2**64, dtype=np.uint64)))
    for numbers in address:
        hashed = _mix((hashed ^ np.asarray(numbers).astype(np.uint64)) + _GOLDEN)
    return hashed.astype(np.int64)


def on_device(drawn: np.ndarray, device: torch.device) -> Tensor:
    """Copies the numbers to the device.

    To a GPU they go from pinned memory: any other copy would wait for all that is queued, and the GPU would run dry
    before its next kernel came.
    """
    tensor = torch.from_numpy(drawn)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _mix(x: Any) -> Any:
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
