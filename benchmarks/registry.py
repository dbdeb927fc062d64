"""What is measured: an operation at a size, in a dtype, as each provider runs it.

An operation names its inputs, says how to draw them, holds a plain formulation in PyTorch that judges everybody, and
counts the work that cannot be avoided. Its providers are this package and its peers; each of them turns the same inputs
into something to call.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import Shape

Inputs = Mapping[str, Tensor]
Outputs = tuple[Tensor, ...]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PASSES = ("forward", "backward", "both")
OURS = "fastvit"


class Unusable(Exception):
    """Why a provider cannot take part here: not installed, no GPU, a size that it does not know."""


@dataclass(frozen=True)
class Work:
    """The least that a pass must do."""

    flops: int  # of matrix products only
    bytes: int  # each input read once, each output written once


@dataclass(frozen=True)
class Case:
    """An operation at one size."""

    op: "Op"
    shape: Shape
    batch: int
    dtype: torch.dtype
    device: torch.device

    @property
    def id(self) -> str:
        name = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        sizes = (self.shape.name, str(self.batch)) if self.op.per_model else (str(self.batch),)
        return "/".join((self.op.name, *sizes, name))

    @property
    def rows(self) -> int:
        """Tokens of the whole batch."""
        return self.batch * self.shape.tokens

    def inputs(self, seed: int) -> dict[str, Tensor]:
        """Random inputs, the same for the same seed and device."""
        return self.op.inputs(self, Draw(self, seed))


class Draw:
    """Random tensors of one case."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case, self.generator = case, torch.Generator(case.device).manual_seed(seed)

    def normal(self, *size: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        drawn = torch.randn(size, generator=self.generator, device=self.case.device)
        return drawn.mul_(scale).add_(mean).to(self.case.dtype)

    def integers(self, high: int, *size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(0, high, size, generator=self.generator, device=self.case.device, dtype=dtype)

    def uniform(self, *size: int) -> Tensor:
        return torch.rand(size, generator=self.generator, device=self.case.device)


@dataclass(frozen=True)
class Bound:
    """A provider with one set of inputs."""

    forward: Callable[[], Outputs]
    leaves: Mapping[str, Tensor]  # what gradients are taken of, by the name of the input
    before: Callable[[], object] = lambda: None  # put right, off the clock, before each call of `forward`


Binder = Callable[[Inputs], Bound]


@dataclass(frozen=True)
class Provider:
    """One way to run an operation. `make` is called once per case; Unusable says why it is not measured."""

    name: str
    make: Callable[[Case], Binder]
    package: str | None = None  # whose version is noted; None for PyTorch and for this package
    slow: bool = False  # compiles for long, and is left out of a quick run
    precision: float | None = None  # relative rounding of a format coarser than the case's: never the best peer
    own: bool = False  # the user's, from a file: shown beside the others, never the peer to beat


@dataclass(frozen=True)
class Op:
    """An operation: its inputs, its plain formula, the least work of a pass, and who can run it."""

    name: str
    title: str
    inputs: Callable[[Case, Draw], dict[str, Tensor]]
    plain: Callable[[Case], Callable[..., Any]]  # of the inputs by name: the answer in float64, a yardstick in others
    work: Callable[[Case], Mapping[str, Work]]  # by pass
    providers: Sequence[Provider]
    passes: tuple[str, ...] = PASSES
    per_model: bool = True  # False: the batch size is all that it takes from the model
    checked_call: int = 1  # the outputs of which call are judged
    dtype: torch.dtype | None = None  # the only one, whatever is asked for
    constants: frozenset[str] = field(default_factory=frozenset)  # floating inputs without a gradient


def functional(make: Callable[[Case], Callable[..., Any]]) -> Callable[[Case], Binder]:
    """For functions of tensors: `make(case)` takes the inputs by name, and gradients are those of the inputs."""

    def maker(case: Case) -> Binder:
        function = make(case)

        def bind(inputs: Inputs) -> Bound:
            given = leaves_of(case.op, inputs)
            leaves = {name: tensor for name, tensor in given.items() if tensor.requires_grad}
            return Bound(lambda: as_tuple(function(**given)), leaves)

        return bind

    return maker


def leaves_of(op: Op, inputs: Inputs) -> dict[str, Tensor]:
    """The inputs as leaves: those that are floating and no constants with a gradient."""
    return {
        name: tensor.detach().requires_grad_(tensor.is_floating_point() and name not in op.constants)
        for name, tensor in inputs.items()
    }


def as_tuple(outputs: Any) -> Outputs:
    """ValueError unless they are a tensor or a sequence of tensors."""
    found = (outputs,) if isinstance(outputs, Tensor) else outputs
    if not isinstance(found, (tuple, list)) or not all(isinstance(output, Tensor) for output in found):
        raise ValueError(f"gives {type(outputs).__name__}, not tensors")
    return tuple(found)


def all_cases(
    ops: Sequence[Op], shapes: Sequence[Shape], dtypes: Sequence[torch.dtype], device: torch.device
) -> list[Case]:
    """In order of importance: the large batch of every model, then the small ones."""
    found: dict[str, Case] = {}
    for level in range(max(len(shape.batches) for shape in shapes)):
        for shape in shapes:
            for batch in shape.batches[level : level + 1]:
                for dtype in dtypes:
                    for op in ops:
                        if shape.only and op.name not in shape.only:
                            continue
                        case = Case(op, shape, batch, op.dtype or dtype, device)
                        found.setdefault(case.id, case)
    return list(found.values())
