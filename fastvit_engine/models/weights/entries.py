"""How the parameters of our model are named and laid out elsewhere: one entry per parameter, for both directions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvit_engine.errors import UserError
from fastvit_engine.shown import brief

Dimensions = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One parameter of ours, and the tensors elsewhere that it is made of.

    theirs: names and shapes. Several are equal parts of ours along its first axis, as queries, keys and values are.
    axes: the axes of ours in the order in which theirs has them, before theirs is given its own shape; None: the same.
    absent_rows: rows of zeros that ours has at the beginning of axis 1 and theirs lacks.
    """

    ours: str
    shape: Dimensions
    theirs: Mapping[str, Dimensions]
    axes: Dimensions | None = None
    absent_rows: int = 0

    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        """Our parameter from the tensors of `theirs`, in that order."""
        axes = self.axes or tuple(range(len(self.shape)))
        part = (self.shape[0] // len(tensors), *self.shape[1:])
        if self.absent_rows:
            part = (part[0], part[1] - self.absent_rows, *part[2:])
        back = [axes.index(axis) for axis in range(len(axes))]
        parts = [tensor.reshape([part[axis] for axis in axes]).permute(back) for tensor in tensors]
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self.absent_rows:
            zeros = joined.new_zeros(joined.shape[0], self.absent_rows, *joined.shape[2:])
            joined = torch.cat([zeros, joined], dim=1)
        return joined.contiguous()

    def to_theirs(self, tensor: Tensor) -> dict[str, Tensor]:
        """The tensors of `theirs` from our parameter."""
        axes = self.axes or tuple(range(len(self.shape)))
        parts = (
            tensor[:, self.absent_rows :].chunk(len(self.theirs))
            if self.absent_rows
            else tensor.chunk(len(self.theirs))
        )
        return {
            name: part.permute(axes).reshape(shape).contiguous()
            for (name, shape), part in zip(self.theirs.items(), parts, strict=True)
        }


def check_shapes(
    expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], where: str, what: str = "tensor"
) -> None:
    """Raises UserError naming the first tensor that is missing, misshapen or not expected, with both shapes."""
    for name in [*expected, *found]:
        here, there = (None if name not in shapes else list(shapes[name]) for shapes in (expected, found))
        if here != there:
            texts = ["absent" if shape is None else brief(shape) for shape in (there, here)]
            raise UserError(
                f"{where}: {what} '{brief(name)}' is {texts[0]} there and {texts[1]} in the model that it is of"
            )


def check_finite(tensors: Mapping[str, Tensor], where: str, what: str = "tensor") -> None:
    """Raises UserError naming the first tensor with NaN or infinity, of which every answer of a model would be NaN."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            found = "NaN" if tensor.isnan().any() else "numbers that are infinite in float32"
            raise UserError(f"{where}: {what} '{brief(name)}' holds {found}: the weights are broken, get others")


def same(ours: str, theirs: str, *shape: int) -> Entry:
    """A parameter that differs in its name only."""
    return Entry(ours, shape, {theirs: shape})
