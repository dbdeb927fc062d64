"""Compiles every kernel at its production shapes, without a GPU, and tabulates what the compiler made of it.

    python -m fastvit_kernels.tuning.codegen --output benchmarks/results/codegen

Each operation lists its cases in a `codegen.py` beside its kernels. A case calls the same launch functions as training
does, on meta tensors; here the launches are compiled for each target instead of run, and registers, spills, shared
memory and matrix instructions are read from the machine code. So what is compiled is what training would launch. It
says nothing about speed.

Three columns are about the asynchronous matrix products of Hopper. `serialised` counts the messages by which ptxas says
that it lets none of them overlap with anything, which costs a large part of their speed; `waits` is then as large as
`matrix instructions`. `hazards` counts instructions that overwrite what a product has still to read: see `sass`. For
sm_100, it counts products that add to the one just before, which Triton before 3.9 may compile to wrong results.
"""

import argparse
import importlib
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastvit_kernels import dispatch, toolchain
from fastvit_kernels.tuning import sass

PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, with the shared memory (LDS on AMD) that one program may use, in bytes."""

    gpu: dispatch.Gpu
    compiler: GPUTarget
    shared_limit: int


TARGETS = {
    "sm_80": Target(dispatch.Gpu("sm_80", 108, "A100"), GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": Target(dispatch.Gpu("sm_90", 132, "H200"), GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": Target(dispatch.Gpu("sm_100", 148, "B200"), GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": Target(dispatch.Gpu("gfx942", 304, "MI300X"), GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


@dataclass(frozen=True)
class Case:
    """Launches to compile: `launch()` calls the launch functions of an operation on meta tensors."""

    name: str
    launch: Callable[[], object]
    matrix_kernels: tuple[str, ...] = ()  # kernels that must use the matrix instructions of the target
    targets: tuple[str, ...] | None = None  # those that have what it needs; None: all


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled for one target. Counts of instructions are static: a loop body counts once."""

    op: str
    case: str
    kernel: str
    target: str
    warps: int
    registers: int  # a thread
    stack_bytes: int  # a thread; above 0 means spills, or an array that is indexed at run time
    spill_stores: int
    spill_loads: int
    shared_bytes: int  # a program
    matrix_instructions: int  # HMMA on sm_80, HGMMA and, for FP8, QGMMA on sm_90, tcgen05 on sm_100, MFMA on gfx942
    waits: int  # for HGMMA; this and the next are of sm_90, and 0 elsewhere
    serialised: int  # messages C7510 to C7515 of ptxas
    hazards: int  # 0 for sm_80 and gfx942
    is_matrix_kernel: bool


def op_names() -> list[str]:
    """The operations that have cases."""
    return sorted(path.parent.name for path in PACKAGE.glob("*/codegen.py") if path.parent.name != "tuning")


def cases(op: str) -> list[Case]:
    return list(importlib.import_module(f"fastvit_kernels.{op}.codegen").cases())


def compile_case(op: str, index: int, target: str) -> list[Compiled]:
    """Every kernel that one case of an operation launches, as compiled for one of `TARGETS`."""
    return compiled(op, cases(op)[index], TARGETS[target])


def compiled(op: str, case: Case, target: Target) -> list[Compiled]:
    """Every kernel that the case launches, in order."""
    results = [result(op, case, target, kernel) for kernel in launched(case, target)]
    if missing := set(case.matrix_kernels) - {result.kernel for result in results}:
        raise ValueError(f"case {case.name!r} of {op} does not launch {', '.join(sorted(missing))}")
    return results


def launched(case: Case, target: Target, wanted: Collection[str] | None = None) -> list[Any]:
    """Triton's compiled kernels of a case, in order: all, or those of the names `wanted`."""
    with dispatch.compiling_for(target.gpu), launches_compiled(target.compiler, wanted) as kernels:
        case.launch()
    return kernels


def result(op: str, case: Case, target: Target, kernel: Any) -> Compiled:
    name, arch = kernel.metadata.name, target.gpu.arch
    return Compiled(
        op,
        case.name,
        name,
        arch,
        kernel.metadata.num_warps,
        shared_bytes=kernel.metadata.shared,
        is_matrix_kernel=name in case.matrix_kernels,
        **read(kernel, arch),
    )


def compile_all(ops: Sequence[str], targets: Sequence[str], jobs: int) -> Iterator[tuple[str, list[Compiled]]]:
    """Each operation in turn with all its cases, compiled for these targets in `jobs` processes."""
    work = [
        (op, index, target)
        for op in ops
        for index, case in enumerate(cases(op))
        for target in targets
        if case.targets is None or target in case.targets
    ]
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        done = zip(work, pool.map(compile_case, *zip(*work, strict=True)), strict=True)
        for op, group in groupby(done, key=lambda one: one[0][0]):
            yield op, [result for _, results in group for result in results]


class OfflineDriver:
    """Tells Triton that this target is the current device, which is all it asks before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend}:{self.target.arch}"  # a key: Triton keeps compiled kernels by device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def launches_compiled(target: GPUTarget, wanted: Collection[str] | None = None) -> Iterator[list[Any]]:
    """Inside, a kernel launch compiles for `target`, runs nothing, and appends the compiled kernel to the list.

    Launches of kernels that are not `wanted` do nothing at all; None wants all.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("kernels cannot be compiled while TRITON_INTERPRET=1 is set")
    compiled: list[Any] = []
    run, active = JITFunction.run, driver._active

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if wanted is None or kernel.__name__ in wanted:
            with messages_kept() as said:
                compiled.append(run(kernel, *args, grid=grid, warmup=True, **kwargs))
            if said.getvalue():  # nothing is said of a kernel that was found in Triton's cache
                _said[compiled[-1].asm["ptx"]] = said.getvalue()

    JITFunction.run = compile_only
    driver.set_active(OfflineDriver(target))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = active


_said: dict[str, str] = {}  # by PTX: what ptxas said when it assembled it


@contextmanager
def messages_kept() -> Iterator[io.StringIO]:
    """Inside, what ptxas says is kept instead of thrown away."""
    said = io.StringIO()
    try:
        with knobs.nvidia.scope(), redirect_stdout(said):
            knobs.nvidia.dump_ptxas_log = True
            yield said
    except Exception:
        print(said.getvalue())
        raise


def read(kernel: Any, target: str) -> dict[str, int]:
    """What the machine code of a compiled kernel says, by the names of `Compiled`."""
    return read_amd(kernel) if target.startswith("gfx") else read_nvidia(kernel, target)


def read_nvidia(kernel: Any, target: str) -> dict[str, int]:
    return read_cubin(kernel, target, kernel.asm["cubin"], lambda: messages(kernel))


def read_assembled(kernel: Any, target: str) -> dict[str, int]:
    """What the code says that the ptxas of `TRITON_PTXAS_PATH` makes of a kernel, whichever assembled it before."""
    cubin, said = assembled(kernel)
    return read_cubin(kernel, target, cubin, lambda: said)


def read_cubin(kernel: Any, target: str, cubin: bytes, said: Callable[[], str]) -> dict[str, int]:
    ptx, usage = kernel.asm["ptx"], cuobjdump(cubin, "-res-usage")
    stack_bytes = number(r"STACK:(\d+)", usage)
    asynchronous = "wgmma.mma_async" in ptx
    # without a stack nothing spills, and without mma in PTX there is none in the machine code: no need to look
    text = cuobjdump(cubin, "-sass") if stack_bytes or ("mma" in ptx and target != "sm_100") else ""
    if target == "sm_100":
        matrix_instructions = len(re.findall(r"tcgen05\.mma", ptx))
        hazards = chained_products(kernel.asm["ttir"]) if matrix_instructions else 0
    else:
        matrix_instructions = len(re.findall(r"\b[HQ]GMMA\b" if target == "sm_90" else r"\bHMMA\b", text))
        hazards = sass.hazards(text) if asynchronous else 0
    return {
        "registers": number(r"REG:(\d+)", usage),
        "stack_bytes": stack_bytes,
        "spill_stores": len(re.findall(r"\bSTL\b", text)),  # stores to local memory, where spilled registers live
        "spill_loads": len(re.findall(r"\bLDL\b", text)),
        "matrix_instructions": matrix_instructions,
        "waits": sass.waits(text) if asynchronous else 0,
        "serialised": len(re.findall(r"\(C751[0-5]\)", said())) if asynchronous else 0,
        "hazards": hazards,
    }


def chained_products(ttir: str) -> int:
    """How many products of a kernel in Triton's IR add to the result of another, not counting that of a loop."""
    products: set[str] = set()
    chained = 0
    for name, operation, operands in re.findall(r"(%\w+)(?::\d+)? = (\S+)(.*)", ttir):
        if operation != "tt.dot":
            products.discard(name)  # regions side by side may use a name for different things
            continue
        chained += operands.split(",")[2].split()[0] in products
        products.add(name)
    return chained


def messages(kernel: Any) -> str:
    """What ptxas says when it assembles a kernel: again, for one from Triton's cache, which keeps no messages."""
    ptx = kernel.asm["ptx"]
    if ptx not in _said:
        _said[ptx] = assembled(kernel)[1]
    return _said[ptx]


def assembled(kernel: Any) -> tuple[bytes, str]:
    """Machine code of a kernel's PTX, and what ptxas says of it."""
    target = kernel.metadata.target
    with messages_kept() as said:
        cubin = CUDABackend(target).make_cubin(kernel.asm["ptx"], {}, kernel.metadata, target.arch)
    return cubin, said.getvalue()


def read_amd(kernel: Any) -> dict[str, int]:
    assembly = kernel.asm["amdgcn"]
    return {
        "registers": number(r"\.vgpr_count:\s*(\d+)", assembly),
        "stack_bytes": number(r"\.private_segment_fixed_size:\s*(\d+)", assembly),
        "spill_stores": len(re.findall(r"\bscratch_store", assembly)),
        "spill_loads": len(re.findall(r"\bscratch_load", assembly)),
        "matrix_instructions": len(re.findall(r"\bv_mfma", assembly)),
        "waits": 0,
        "serialised": 0,
        "hazards": 0,
    }


@lru_cache  # the disassembler takes 0.3 s, and cases often share a kernel
def cuobjdump(cubin: bytes, option: str) -> str:
    """What the cuobjdump that Triton ships writes: resource usage, or machine code as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern} in what the compiler wrote")
    return int(match[1])


def markdown(results: Sequence[Compiled]) -> str:
    """The kernels of one operation as a table with every field but `op`, one line per kernel, case and target."""
    columns = [field.name for field in fields(Compiled) if field.name != "op"]
    lines = [
        "# What the compiler made of each kernel",
        "",
        f"Triton {triton.__version__}, compiled without a GPU by `python -m fastvit_kernels.tuning.codegen`."
        " Instructions are counted statically. No speed follows from these figures.",
        "",
        "| " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|" + "---|" * len(columns),
    ]
    lines += ["| " + " | ".join(str(getattr(result, column)) for column in columns) + " |" for result in results]
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def say(text: str) -> None:
    """Prints a line at once; nothing more if the reader has left, as tables are to be written all the same."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fastvit_kernels.tuning.codegen",
        description="Compile every kernel for GPUs that this machine need not have, and tabulate registers, spills, "
        "shared memory and matrix instructions.",
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/codegen"), help="folder to write to")
    parser.add_argument("--ops", nargs="+", default=op_names(), choices=op_names(), help="operations (default: all)")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS, help="default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    parser.add_argument("--ptxas", type=Path, help="another assembler for all NVIDIA targets, such as a newer one")
    arguments = parser.parse_args()
    if arguments.ptxas:
        path = str(arguments.ptxas.resolve(strict=True))
        os.environ |= {"TRITON_PTXAS_PATH": path, "TRITON_PTXAS_BLACKWELL_PATH": path}
    arguments.output.mkdir(parents=True, exist_ok=True)
    for target in arguments.targets:
        say(toolchain.describe(target))
    for op, own in compile_all(arguments.ops, arguments.targets, arguments.jobs):
        write(arguments.output / f"{op}.md", markdown(own))
        spilling = sum(result.spill_stores + result.spill_loads > 0 for result in own)
        say(f"{op}: {len(own)} kernels compiled, {spilling} spill: {arguments.output / op}.md")


if __name__ == "__main__":
    main()
