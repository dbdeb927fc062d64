"""Chooses which implementation of an operation runs, Triton or plain PyTorch, and says why.

`FASTVIT_KERNELS` is read once, at import: `auto`, `triton` or `reference` for all operations, or a choice for each, as
in `auto,patch_embed=reference`; its grammar is in `choices`. Another value is a ValueError there, and a sentence from
`python -m fastvit_kernels...`.

`auto`, the default, runs Triton kernels on CUDA and ROCm tensors of bfloat16 and float16, and plain PyTorch on all
others. Float32 tensors run the kernels of operations without matrix products. Products of float32 are PyTorch's, which
has the faster kernels and obeys `torch.set_float32_matmul_precision`; under autocast, blocks compute in its dtype, and
run their kernels. Where the table of the GPU says that another implementation was measured faster, that one runs. Plain
PyTorch runs under the transforms of `transforms.py`. What is asked for by name is never replaced by another: what it
cannot run is an error.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastvit_kernels import libraries, table, toolchain, transforms
from fastvit_kernels.choices import OPERATIONS, Choice, parse
from fastvit_kernels.table import Runs

WITH_GELU = ("block", "mlp")  # operations with products that QuACK can run
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # kernels compute in float32, so not float64
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton's interpreter runs kernels on the CPU, for tests. Triton reads the variable when it is imported.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"

_setting = os.environ.get("FASTVIT_KERNELS") or "auto"  # empty is unset, as for most variables
_choices: Mapping[str, Choice] = {}
try:
    _choices = parse(_setting, "FASTVIT_KERNELS")
except ValueError as error:
    table.refuse_variable(str(error))


class Plan(NamedTuple):
    """What runs an operation, one of its choices or, where it cannot run as asked, "error"; and why."""

    runs: str
    why: str = ""


def uses_triton(
    operation: str, tensor: Tensor, obstacle: str | None = None, measured: Callable[[], Runs] | None = None
) -> bool:
    """Whether an operation on this tensor runs its Triton kernel, see `provider`."""
    return provider(operation, tensor, obstacle, measured) == "triton"


def provider(
    operation: str, tensor: Tensor, obstacle: str | None = None, measured: Callable[[], Runs] | None = None
) -> str:
    """What runs an operation on this tensor. Raises RuntimeError where what was asked for cannot.

    Args:
        operation: one of `choices.OPERATIONS`.
        obstacle: why no implementation but the reference can take this call, or None.
        measured: says what the table has for this call; asked in `auto` on a GPU, but not while PyTorch compiles,
            whose graphs may be for many sizes.
    """
    asked, dtype, on_gpu = asked_for(operation), computed_dtype(operation, tensor), is_on_gpu(tensor)
    runs = plan(operation, dtype, on_gpu).runs
    if asked == "auto" and measured is not None and can_run(dtype, on_gpu) and not torch.compiler.is_compiling():
        runs = measured().provider
    if obstacle is None and runs not in ("error", "reference"):
        obstacle = transforms.obstacle()
    if runs != "error" and (obstacle is None or asked == "reference"):
        return runs
    if asked == "auto":
        return "reference"
    raise RuntimeError(refusal(tensor, obstacle))


def can_run(dtype: torch.dtype, on_gpu: bool) -> bool:
    """Whether there are kernels in `auto`."""
    return HAS_TRITON and on_gpu and dtype in KERNEL_DTYPES


def is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def asked_for(operation: str) -> str:
    """The choice in force: "auto" or another of `choices.OPERATIONS[operation].choices`."""
    return _choices[operation].asked


def plan(operation: str, dtype: torch.dtype, on_gpu: bool) -> Plan:
    """What runs an operation that computes in `dtype`, if nothing in the call itself is in the way."""
    asked, why = _choices[operation]
    if asked == "reference":
        return Plan("reference", why)
    if asked not in ("auto", "triton"):  # a library
        if not on_gpu or dtype not in (torch.bfloat16, torch.float16):
            return Plan("error", "needs bf16 or fp16 on a GPU")
        reason = libraries.quack_obstacle(arch_here()) if asked == "quack" else None
        return Plan(asked, why) if reason is None else Plan("error", reason)
    unless = "error" if asked == "triton" else "reference"
    if not HAS_TRITON:
        return Plan(unless, "triton is not installed")
    if dtype not in KERNEL_DTYPES:
        return Plan(unless, f"not {str(dtype).removeprefix('torch.')}")
    if not on_gpu:
        if asked == "triton" and INTERPRETED:
            return Plan("triton", "interpreted")
        return Plan(unless, "needs a GPU" if unless == "error" else "on the CPU")
    if asked == "auto" and unmeasured(operation, dtype).provider == "reference":
        return Plan("reference", "fp32 products")
    return Plan("triton", why)


def plan_for(operation: str, weight: Tensor) -> Plan:
    """What runs an operation with this weight, here and now: `plan` for its dtype, or that of autocast, and device."""
    return plan(operation, computed_dtype(operation, weight), is_on_gpu(weight))


def plans_for(weight: Tensor, operations: Sequence[str]) -> dict[str, Plan]:
    """What runs each of these operations; also `gemm`, if QuACK is asked for and one of them has products for it."""
    plans = {operation: plan_for(operation, weight) for operation in operations}
    if asked_for("gemm") == "quack" and any(plans[one].runs == "triton" for one in WITH_GELU if one in plans):
        plans["gemm"] = plan_for("gemm", weight)
    return plans


def shown(weight: Tensor, *operations: str) -> str:
    """Who runs a module that consists of these operations, for its `repr`: "runs=triton"."""
    plans = plans_for(weight, operations)
    gemm = plans.pop("gemm", None)
    runs = {plan.runs for plan in plans.values()}
    parts = [f"runs={runs.pop()}"] if len(runs) == 1 else [f"{name}={plan.runs}" for name, plan in plans.items()]
    if gemm is not None:
        parts.append(f"gemm={gemm.runs}" + (f" ({gemm.why})" if gemm.runs == "error" else ""))
    return ", ".join(parts)


def unmeasured(operation: str, dtype: torch.dtype) -> Runs:
    """What runs an operation in `auto` on a GPU whose table does not say it."""
    return Runs("reference" if dtype == torch.float32 and OPERATIONS[operation].multiplies else "triton")


def computed_dtype(operation: str, tensor: Tensor) -> torch.dtype:
    """The dtype of the tensor, or that of autocast if the operation obeys it; autocast leaves float64 as it is."""
    cast = autocast_dtype(tensor) if OPERATIONS[operation].autocasts else None
    return tensor.dtype if cast is None else cast


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast casts the operands of a product with this tensor to, or None if it is off or leaves them alone."""
    kind = tensor.device.type
    if kind == "meta" or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


@contextmanager
def using(implementation: str) -> Iterator[None]:
    """Puts a setting, say "auto,attention=reference", in the place of the environment's inside the `with` block."""
    before = use(implementation)
    try:
        yield
    finally:
        use(before)


def use(implementation: str) -> str:
    """As `using`, from now on. Returns the setting that was in force."""
    global _setting, _choices
    chosen, before = parse(implementation, "implementation"), _setting
    _setting, _choices = implementation, chosen
    return before


def explain() -> str:
    """What runs on this machine for each operation, and why, as text to print."""
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else "none"
    columns = ((torch.bfloat16, True), (torch.float32, True), (torch.float32, False))
    operations = [operation for operation in OPERATIONS if operation != "gemm"]
    plans = {operation: [plan(operation, *column) for column in columns] for operation in operations}
    rows = [[operation, *map(described, row)] for operation, row in plans.items()]
    lines = [
        f"FASTVIT_KERNELS={_setting}, GPU: {device}",
        table.describe(table.gpu_name(device) if on_gpu else None),
        *(table.choices_of_providers(table.gpu_name(device)) if on_gpu else ()),
        *(line_on_quack(table.gpu_name(device)) if on_gpu else ()),
        *([compiled_by(gpu(torch.device("cuda", torch.cuda.current_device())).arch)] if on_gpu and HAS_TRITON else ()),
        *aligned([["operation", "GPU, 16-bit", "GPU, fp32", "CPU"], *rows]),
        f"gemm: {multiplied_by()} (products inside blocks that run triton)",
        "16-bit is bf16 and fp16. Under autocast, block operators and patch_embed run as",
        "in its dtype. The reference also runs for float64, and for attention with a",
        "head dimension above 128; both are errors if triton is asked for.",
    ]
    here = [row[0 if on_gpu else 2].runs for row in plans.values()]
    counts = [f"{here.count(runs)} {runs}" for runs in sorted(set(here), reverse=True)]
    lines.append(f"{len(here)} operations on {'this GPU, in bf16' if on_gpu else 'the CPU'}: {', '.join(counts)}")
    return "\n".join(lines)


def described(plan: Plan) -> str:
    return f"{plan.runs} ({plan.why})" if plan.why else plan.runs


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with each column as wide as its widest cell, and two spaces between columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def multiplied_by() -> str:
    asked = asked_for("gemm")
    if asked == "auto":
        return "cublas, or what the table says"
    if asked != "quack":
        return f"{asked} (asked for)"
    reason = libraries.quack_obstacle(arch_here())
    return f"quack with GELU, cublas without (asked for{f'; error: {reason}' if reason else ''})"


def line_on_quack(gpu: str) -> list[str]:
    """Whether QuACK runs what the table of this GPU has for it, if there is any."""
    found = table.table_for(gpu)
    entries = [e for e in found.entries if e.kernel == "quack_gemm" and e.use["runs"]] if found else []
    if not entries:
        return []
    reason = libraries.quack_obstacle(arch_here())
    by = "quack" if reason is None else f"cublas, as {reason}"
    return [f"quack_gemm: the table has {len(entries)} products with GELU for QuACK, which run in {by}"]


def compiled_by(arch: str) -> str:
    try:
        return toolchain.describe(arch)
    except RuntimeError as error:
        return f"assembler: {error}"


class Gpu(NamedTuple):
    """What launch parameters may depend on."""

    arch: str  # "sm_90", "gfx942", or "interpreter"
    multiprocessors: int  # compute units on AMD
    name: str = ""  # as tuning tables have it, "H200"; empty where there are none


_compiling_for: Gpu | None = None


def arch_here() -> str | None:
    """The architecture that launches on the current device are for, or None without a GPU."""
    if _compiling_for is not None:
        return _compiling_for.arch
    return gpu(torch.device("cuda", torch.cuda.current_device())).arch if torch.cuda.is_available() else None


def compiles_only() -> bool:
    """Whether launches compile for a GPU that need not be here, and run nothing."""
    return _compiling_for is not None


def gpu(device: torch.device) -> Gpu:
    """The GPU that a launch on this device is for."""
    return _compiling_for or _properties(device)


@contextmanager
def compiling_for(target: Gpu) -> Iterator[None]:
    """Makes launches inside the `with` block compile for a GPU that need not be here: see `tuning.codegen`."""
    global _compiling_for
    _compiling_for = target
    try:
        yield
    finally:
        _compiling_for = None


@lru_cache
def _properties(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return Gpu("interpreter", 2)
    properties = torch.cuda.get_device_properties(device)
    name = table.gpu_name(properties.name)
    if torch.version.hip:
        return Gpu(properties.gcnArchName.partition(":")[0], properties.multi_processor_count, name)
    return Gpu(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count, name)


def refusal(tensor: Tensor, obstacle: str | None) -> str:
    """The sentence for what cannot run as it was asked for."""
    if obstacle is not None:
        reason = obstacle
    elif not HAS_TRITON:
        reason = "triton is not installed"
    elif tensor.dtype not in KERNEL_DTYPES:
        reason = f"the kernels take float32, bfloat16 and float16, not {tensor.dtype}"
    else:
        reason = f"Triton runs on a GPU, not on {tensor.device}, unless TRITON_INTERPRET=1 is set before Python starts"
    return f"FASTVIT_KERNELS={_setting} was asked for, but {reason}"
