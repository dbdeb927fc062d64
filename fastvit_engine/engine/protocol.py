"""What training, checkpoints and health checks need of an engine; nothing here knows which library it is made of."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

GradientNorm = float | Tensor


@dataclass(frozen=True)
class ParameterSlice:
    """Elements [start, stop) of the flattened parameter or buffer `name`; `values` is a 1-D view."""

    name: str
    start: int
    values: Tensor

    @property
    def stop(self) -> int:
        return self.start + self.values.numel()


class TrainingEngine(Protocol):
    """A model, its optimizer, and the processes that train it together.

    The trained state is a set of parameter slices that depend neither on the ZeRO stage nor on the number of
    processes. Reading a slice reads the engine's memory; writing to one changes the engine.
    """

    model: nn.Module  # for forward passes: call it on every process at the same time
    zero_stage: int

    @property
    def replicated(self) -> bool:
        """Whether every process holds the whole state; otherwise each element belongs to exactly one process."""

    # ---- a step

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradients of one micro-batch. `loss`: a scalar.

        A step's gradient is that of the mean loss over micro-batches and processes, whatever the sizes of those are.
        """

    def step(self) -> None:
        """Ends a micro-batch; after the last one of a global batch, clips the gradients and updates the weights."""

    def set_learning_rate(self, learning_rate: float) -> None:
        """Sets the learning rate of the next update, that of the head if layers differ (optimizer.layer_decay)."""

    def approve_updates(self, approve: Callable[[GradientNorm], bool]) -> None:
        """Calls `approve` before each update with the gradient norm (over all processes, unscaled, before clipping).

        If it returns False, the update changes neither weights nor optimizer state. It may be called several times
        per update. It is not called if the engine discards the step itself because a gradient is not finite.
        """

    # ---- parameters

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The whole shape of each parameter, however it is sharded."""

    @property
    def frozen(self) -> frozenset[str]:
        """The parameters that do not learn: they have master weights, and no optimizer state."""

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that learn, to register gradient hooks on; a sharded one may have no elements."""

    def held_parameters(self) -> list[tuple[str, Tensor]]:
        """What this process holds of the parameters the model computes with: the whole, or its shard if it has one."""

    def replicas(self) -> Iterator[Tensor]:
        """The parameters and buffers of which every process holds a copy, in the same order everywhere."""

    # ---- state

    def master_weights(self) -> list[ParameterSlice]:
        """The fp32 master weights that this process holds."""

    def optimizer_state(self) -> dict[str, list[ParameterSlice]]:
        """What this process holds of the optimizer's tensors that are like the weights; empty before the first step.

        By kind (Adam: exp_avg, exp_avg_sq). A kind may be there for some of the parameters only.
        """

    def optimizer_statistics(self) -> dict[str, list[ParameterSlice]]:
        """The optimizer's other tensors by kind, which every process holds whole, such as means of rows."""

    def optimizer_shapes(self) -> dict[str, dict[str, list[int]]]:
        """For each kind of the two the parameters that have it, and the whole shape that it has there."""

    def buffers(self) -> list[ParameterSlice]:
        """The model's persistent buffers, which every process holds whole."""

    def running_statistics(self) -> list[ParameterSlice]:
        """Those of `buffers` that belong to the weights, and whose average belongs to an average of the weights."""

    def state_tensors(self) -> list[Tensor]:
        """What the slices of all these kinds are views of: while the tensors are the same, so are the slices.

        For whom the slices themselves, after each step, would take too long.
        """

    def scalars(self) -> dict[str, float]:
        """The optimizer's counters and the loss scale; the same on all processes."""

    def prepare_optimizer(self, kinds: Mapping[str, Collection[str]], scalars: dict[str, float]) -> None:
        """Gives the optimizer exactly these tensors, zeroed for the caller to overwrite, and these counters.

        kinds: for each kind of tensor the parameters that have it.
        """

    def publish(self) -> None:
        """Makes the weights the model computes with equal to the master weights; collective."""

    def reset_progress(self, step: int) -> None:
        """Drops the gradients of an unfinished step and sets the number of optimizer steps done."""

    def close(self) -> None:
        """Releases hooks and buffers; the engine cannot be used afterwards."""


def share(slices: Sequence[ParameterSlice], rank: int, size: int) -> list[ParameterSlice]:
    """The `rank`-th of `size` equal contiguous shares of the slices, laid end to end."""
    total = sum(part.values.numel() for part in slices)
    first, last = total * rank // size, total * (rank + 1) // size
    shared, offset = [], 0
    for part in slices:
        start, stop = max(0, first - offset), min(part.values.numel(), last - offset)
        if start < stop:
            shared.append(ParameterSlice(part.name, part.start + start, part.values[start:stop]))
        offset += part.values.numel()
    return shared
