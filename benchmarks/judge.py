"""Whether a provider computes what it should.

Everybody is judged like the kernels in their own tests: with e(x) the largest and the RMS error against float64,
e(provider) <= 2 * e(plain PyTorch in the same dtype) + a rounding floor, for each output and each gradient. The floor
is one rounding of the result and the float32 sum of some thousand terms in an order of its own. NaN never passes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.registry import Bound, Case, Inputs, Provider, as_tuple, leaves_of

Results = Mapping[str, Tensor]
SUM = 32 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Verdict:
    """The result that comes nearest to its bound, or lies farthest beyond."""

    result: str
    measure: str  # largest or RMS
    error: float
    bound: float

    @property
    def passes(self) -> bool:
        return self.error <= self.bound  # so that NaN fails

    @property
    def severity(self) -> float:
        """Above 1 it fails; infinite for NaN, which no comparison would find."""
        if not math.isfinite(self.error):
            return math.inf
        return self.error / self.bound if self.bound else (math.inf if self.error else 0.0)

    def __str__(self) -> str:
        return f"{self.measure} error of the {self.result} is {self.error:.2g}, allowed {self.bound:.2g}"


class Judge:
    """Knows the exact results of a case for one set of inputs."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.case, self.inputs = case, inputs
        self.copies = {name: tensor.clone() for name, tensor in inputs.items()}
        plain, self.cotangents = self._plain(case.dtype)
        self.dtypes = {name: tensor.dtype for name, tensor in plain.items()}
        try:
            exact, _ = self._plain(torch.float64)
            self.exact_dtype = "float64"
        except torch.OutOfMemoryError:
            exact, _ = self._plain(torch.float32)
            self.exact_dtype = "float32"
        self.exact = {name: (*sizes(tensor), tensor) for name, tensor in exact.items()}
        self.plain_errors = {name: sizes(plain[name].double() - tensor.double()) for name, tensor in exact.items()}
        self.gradient_size = sum(exact[name].numel() for name in exact if name.startswith("gradient"))

    def judge(self, provider: Provider, bound: Bound) -> Verdict:
        """Raises ValueError if the results are not even comparable."""
        results = run(bound, self.cotangents, self.case.op.checked_call)
        self.check_inputs()
        given = sum(leaf.numel() for leaf in bound.leaves.values())
        if given != self.gradient_size:
            raise ValueError(f"takes gradients of {given:,} numbers, not of {self.gradient_size:,}")
        rounding = provider.precision or torch.finfo(self.case.dtype).eps
        verdicts = []
        for name, (largest, rms, exact) in self.exact.items():
            if name not in results:  # a provider may hold it in another form, then its size was counted above
                continue
            if results[name].shape != exact.shape:
                raise ValueError(f"the {name} has shape {list(results[name].shape)}, not {list(exact.shape)}")
            if provider.own and results[name].dtype != self.dtypes[name]:
                raise ValueError(f"the {name} is {results[name].dtype}, not {self.dtypes[name]}")
            errors = sizes(results[name].double() - exact.double())
            for measure, error, plain, size in zip(
                ("largest", "RMS"), errors, self.plain_errors[name], (largest, rms), strict=True
            ):
                verdicts.append(Verdict(name, measure, error, 2 * plain + (rounding + SUM) * size))
        return max(verdicts, key=lambda verdict: verdict.severity)

    def check_inputs(self) -> None:
        """ValueError, with the inputs put right again, if a provider has written into them: all take the same ones."""
        if "backward" not in self.case.op.passes:
            return  # an optimizer updates its tensors
        changed = [name for name, copy in self.copies.items() if not torch.equal(copy, self.inputs[name])]
        for name in changed:
            self.inputs[name].copy_(self.copies[name])
        if changed:
            raise ValueError(f"writes into its input {changed[0]}, which others take too")

    def _plain(self, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[Tensor]]:
        cast = {name: self._cast(name, tensor, dtype) for name, tensor in self.inputs.items()}
        given = leaves_of(self.case.op, cast)
        leaves = {name: tensor for name, tensor in given.items() if tensor.requires_grad}
        outputs = as_tuple(self.case.op.plain(self.case)(**given))
        if "backward" not in self.case.op.passes:
            return {f"output {i}": output.detach() for i, output in enumerate(outputs)}, []
        cotangents = draw_cotangents(outputs, self.case.dtype)
        return results_of(outputs, leaves, cotangents), cotangents

    def _cast(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Constants are never made coarser than they are given: nobody rounds them."""
        if not tensor.is_floating_point():
            return tensor
        return tensor.to(torch.promote_types(tensor.dtype, dtype) if name in self.case.op.constants else dtype)


def run(bound: Bound, cotangents: Sequence[Tensor], calls: int = 1) -> Results:
    """The outputs of the last of `calls` calls and their gradients."""
    for _ in range(calls):
        bound.before()
        outputs = bound.forward()
    return results_of(outputs, bound.leaves, cotangents)


def results_of(
    outputs: Sequence[Tensor], leaves: Mapping[str, Tensor], cotangents: Sequence[Tensor]
) -> dict[str, Tensor]:
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    if leaves:
        if len(outputs) != len(cotangents):
            raise ValueError(f"gives {len(outputs)} outputs, not {len(cotangents)}")
        for i, (cotangent, output) in enumerate(zip(cotangents, outputs, strict=True)):
            if output.shape != cotangent.shape:
                raise ValueError(f"output {i} has shape {list(output.shape)}, not {list(cotangent.shape)}")
            if not output.requires_grad:
                raise ValueError(f"output {i} has no gradient")
        given = [c.to(output.dtype) for c, output in zip(cotangents, outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), given, allow_unused=True)
        for name, gradient in zip(leaves, gradients, strict=True):
            if gradient is None:
                raise ValueError(f"gives no gradient of {name}")
            results[f"gradient of {name}"] = gradient
    return results


def draw_cotangents(outputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Gradients of the outputs, the same for every provider: representable in the case's dtype."""
    drawn = []
    for number, output in enumerate(outputs):
        generator = torch.Generator(output.device).manual_seed(number)
        cotangent = torch.randn(output.shape, generator=generator, device=output.device)
        drawn.append(cotangent.to(dtype).to(output.dtype))
    return drawn


def sizes(tensor: Tensor) -> tuple[float, float]:
    """Largest absolute value and root mean square."""
    wide = tensor.double()
    return wide.abs().max().item(), wide.square().mean().sqrt().item()


def poison(case: Case, inputs: Inputs) -> None:
    """Fills the memory that the next results are likely to get with NaN, so that unwritten elements show."""
    if case.device.type == "cuda":
        size = 4 * sum(tensor.nbytes for tensor in inputs.values())
        torch.full((size // 4,), torch.nan, device=case.device)
