"""What of which parameters lies in a tensor that an optimizer updates, and optimizers that need to know it.

ZeRO hands an optimizer flat tensors, each of which holds this process's part of many parameters. AdamW, SGD and Lion
compute each element by itself and notice nothing. A `PartitionedOptimizer` computes with whole parameters, such as
their norms: it is told what lies where, and communicates for what it lacks.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastvit_engine.engine.optimizers.closure import loss_of
from fastvit_engine.engine.optimizers.groups import ParameterGroups
from fastvit_engine.engine.protocol import ParameterSlice


@dataclass(frozen=True)
class Span:
    """Elements [start, start + count) of a flattened parameter, which lie at `offset` of a flat tensor."""

    name: str
    start: int
    offset: int
    count: int


@dataclass(frozen=True)
class Partition:
    """A tensor of fp32 master weights that the optimizer updates, and what of the parameters lies in it.

    names: the parameters that are cut up into this tensor and those of the other processes, the same everywhere.
    """

    tensor: Tensor
    spans: list[Span]
    names: list[str]

    def slices(self, values: Tensor) -> list[ParameterSlice]:
        """The slices of a tensor that is laid out like the master weights."""
        flat = values.detach().view(-1)
        return [ParameterSlice(s.name, s.start, flat.narrow(0, s.offset, s.count)) for s in self.spans]


@dataclass(frozen=True)
class Held:
    """What this process holds of the parameters of a group: 1-D views, one per span in each list."""

    partitions: list[Partition]
    spans: list[Span] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    state: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The parameters that are updated, the same on all processes."""
        return [name for partition in self.partitions for name in partition.names]

    @property
    def device(self) -> torch.device:
        return self.partitions[0].tensor.device


class PartitionedOptimizer(torch.optim.Optimizer):
    """An optimizer whose update of an element depends on others of its parameter, wherever they are.

    `step` does nothing before `attach`: DeepSpeed's optimizer for 16 bits without ZeRO makes a step when it is built.
    """

    dtypes: ClassVar[Mapping[str, torch.dtype]] = {}  # of the state that is not fp32
    # Kinds of state that are of other shapes than the weights, and that every process holds whole.
    statistic_kinds: ClassVar[tuple[str, ...]] = ()

    def __init__(self, groups: ParameterGroups, defaults: dict[str, Any]) -> None:
        super().__init__(groups, defaults)
        self._partitions: list[Partition] = []
        self.shapes: Mapping[str, Sequence[int]] = {}
        self.statistics: dict[str, dict[str, Tensor]] = {}  # by kind and parameter; empty before the first step
        self.replicated = True
        self.device = torch.device("cpu")

    def attach(
        self,
        partitions: Sequence[Partition],
        shapes: Mapping[str, Sequence[int]],
        *,
        replicated: bool,
        device: torch.device,
    ) -> None:
        """Says what the tensors of the groups hold; collective.

        shapes: of the whole parameters. replicated: whether every process holds everything; otherwise each element
        belongs to one. device: where tensors must be to be communicated.
        """
        self._partitions = list(partitions)
        self.shapes, self.replicated, self.device = shapes, replicated, device

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update; collective."""
        loss = loss_of(closure)
        for group in self.param_groups if self._partitions else ():
            tensors = {id(tensor) for tensor in group["params"] if tensor.grad is not None}
            partitions = [partition for partition in self._partitions if id(partition.tensor) in tensors]
            if len(partitions) < len(tensors):
                raise RuntimeError("the optimizer has tensors that it was not told the content of")
            if partitions:
                self.update(group, partitions)
        return loss

    def update(self, group: dict[str, Any], partitions: list[Partition]) -> None:
        """Updates the parameters in these tensors of a group."""
        raise NotImplementedError

    def held(self, partitions: list[Partition], *kinds: str) -> tuple[Held, int]:
        """Views of weights, gradients and these kinds of state, which begin as zeros; and the number of this step."""
        held, step = Held(partitions, state={kind: [] for kind in kinds}), 0
        for partition in partitions:
            tensor, state = partition.tensor, self.state[partition.tensor]
            for kind in kinds:
                if kind not in state:
                    state[kind] = torch.zeros_like(tensor, dtype=self.dtypes.get(kind))
            state.setdefault("step", torch.zeros((), dtype=torch.float32))  # on the host, as PyTorch's own
            state["step"] += 1
            step = int(state["step"])
            gradient = tensor.grad
            assert gradient is not None
            flat = [(held.weights, tensor.detach().view(-1)), (held.gradients, gradient.reshape(-1))]
            flat += [(held.state[kind], state[kind].view(-1)) for kind in kinds]
            for span in partition.spans:
                held.spans.append(span)
                for views, values in flat:
                    views.append(values.narrow(0, span.offset, span.count))
        return held, step

    def sum_over_processes(self, values: Tensor) -> Tensor:
        """The sum of what each process has of the whole; the values themselves if each has everything."""
        if self.replicated or torch.distributed.get_world_size() == 1:
            return values
        moved = values.to(self.device, copy=True)
        torch.distributed.all_reduce(moved)
        return moved.to(values.device)

    def prepare_statistics(self, kinds: Mapping[str, Collection[str]]) -> None:
        """Makes `statistics` have exactly those of `kinds` that it knows, zeroed, for these parameters."""
        self.statistics = {}
        devices = {name: partition.tensor.device for partition in self._partitions for name in partition.names}
        for kind in self.statistic_kinds:
            for name in kinds.get(kind, ()):
                zeros = torch.zeros(self.statistic_shape(kind, name), dtype=torch.float32, device=devices[name])
                self.statistics.setdefault(kind, {})[name] = zeros

    def statistic_shape(self, kind: str, name: str) -> list[int]:
        raise NotImplementedError

    def statistic_slices(self) -> Iterator[tuple[str, ParameterSlice]]:
        for kind, tensors in self.statistics.items():
            for name, tensor in tensors.items():
                yield kind, ParameterSlice(name, 0, tensor.view(-1))
