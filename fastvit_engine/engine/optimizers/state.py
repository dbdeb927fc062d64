"""How much state each kind of optimizer keeps, and for which parameters it keeps other state. Needs no PyTorch."""

import math
import re
from collections.abc import Callable, Sequence

from fastvit_engine.config import OptimizerConfig

Shape = tuple[int, ...]
_OF_BLOCK = re.compile(r"(decoder\.)?blocks\.\d+\.")
_SMALLEST_FACTORED = 16  # rows and columns


def is_hidden_matrix(name: str, shape: Shape) -> bool:
    """Whether it is the matrix of a dense layer inside a block, from one hidden representation to another."""
    return _OF_BLOCK.match(name) is not None and name.endswith(".weight") and len(shape) == 2


def is_factored(name: str, shape: Shape) -> bool:
    """Whether Adafactor factors a parameter's second moment: that of a matrix with at least 16 rows and columns."""
    return len(size := matrix_shape(shape)) == 2 and min(size) >= _SMALLEST_FACTORED


def matrix_shape(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size > 1]


def _moments(number: int) -> Callable[[OptimizerConfig, str, Shape], int]:
    """As `STATE_BYTES`: so many fp32 numbers for each element."""
    return lambda settings, name, shape: 4 * number * math.prod(shape)


def _sgd(settings: OptimizerConfig, name: str, shape: Shape) -> int:
    return 4 * math.prod(shape) * (settings.momentum > 0)


def _muon(settings: OptimizerConfig, name: str, shape: Shape) -> int:
    return (4 if is_hidden_matrix(name, shape) else 8) * math.prod(shape)


def _adafactor(settings: OptimizerConfig, name: str, shape: Shape) -> int:
    return 2 * math.prod(shape) + 4 * (sum(shape) if is_factored(name, shape) else math.prod(shape))


# By `optimizer.kind`: bytes of state for a parameter of this name and shape.
STATE_BYTES: dict[str, Callable[[OptimizerConfig, str, Shape], int]] = {
    "adamw": _moments(2),
    "sgd": _sgd,
    "lion": _moments(1),
    "muon": _muon,
    "lamb": _moments(2),
    "adafactor": _adafactor,
}
