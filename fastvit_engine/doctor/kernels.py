"""Says which implementation runs each operation of the model here, by which tuning table, and with which assembler."""

from collections import Counter
from collections.abc import Iterator

import torch
import triton

from fastvit_engine.doctor.findings import Finding, Group
from fastvit_engine.errors import UserError
from fastvit_engine.observe.units import counted
from fastvit_engine.trusted_folders import trust_compiled_code
from fastvit_kernels import dispatch, explain, table, toolchain
from fastvit_kernels.choices import OPERATIONS

_group = Group("kernels")


def check_kernels(precision: str) -> Iterator[Finding]:
    """precision: train.precision."""
    on_gpu = torch.cuda.is_available()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}[precision]
    runs: dict[str, list[str]] = {}
    for operation in OPERATIONS:
        if operation != "gemm":  # which has no plan of its own: products inside the others
            plan = dispatch.plan(operation, dtype, on_gpu)
            runs.setdefault(f"{plan.runs} ({plan.why})" if plan.why else plan.runs, []).append(operation)
    place = f"{precision} on {'a GPU' if on_gpu else 'the CPU'}"
    found = "; ".join(f"{who}: {', '.join(what)}" for who, what in runs.items())
    if any(who.startswith("error") for who in runs):
        advice = "unset FASTVIT_KERNELS, or set it to auto: what is asked for cannot run here"
        yield _group.problem("operations", f"in {place}, {found}", advice)
    else:
        yield _group.ok("operations", f"in {place}, {found}", same=found)
    yield from _check_table(on_gpu)
    if on_gpu and torch.version.cuda:
        yield from _check_assembler()
    try:
        trust_compiled_code()
        yield _group.ok("compiled code", "its folders belong to this user")
    except UserError as error:
        fault, _, remedy = str(error).partition(": ")
        yield _group.problem("compiled code", fault, remedy)


def _check_table(on_gpu: bool) -> Iterator[Finding]:
    """The tuning table, which the whole job must share."""
    try:
        explained = explain()
    except ValueError as error:  # of another GPU, or another version
        fault, _, remedy = str(error).partition(": ")
        yield _group.problem("tuning table", fault, remedy or "unset FASTVIT_TUNING")
        return
    line = next(line for line in explained.splitlines() if line.startswith("launch parameters: "))
    line = line.removeprefix("launch parameters: ")
    chosen = table.choices_of_providers(table.gpu_name(torch.cuda.get_device_name())) if on_gpu else []
    if chosen:
        counts = Counter(choice.rpartition(": ")[2] for choice in chosen)
        line += f"; of {counted(len(chosen), 'size')} that it names, " + ", ".join(
            f"{who} runs {count}" for who, count in sorted(counts.items())
        )
    known = table.table_for(table.gpu_name(torch.cuda.get_device_name())) if on_gpu else None
    if on_gpu and (known is None or not known.provenance.measured):
        advice = "python -m fastvit_kernels.tuning measures this GPU, and writes the table for FASTVIT_TUNING"
        yield _group.note("tuning table", line, advice, same=line)
    else:
        yield _group.ok("tuning table", line, same=line)


def _check_assembler() -> Iterator[Finding]:
    """The ptxas of every kind of GPU here."""
    devices = range(torch.cuda.device_count())
    for arch in sorted({dispatch.gpu(torch.device("cuda", device)).arch for device in devices}):
        try:
            used = toolchain.assembler(arch)
        except RuntimeError as error:
            yield _group.problem(f"ptxas for {arch}", str(error), "pip install --force-reinstall triton")
            continue
        version = ".".join(map(str, used.version))
        found = f"{version} ({used.origin})"
        faults = toolchain.faults(arch, triton.__version__, used.version)
        if faults:
            reports = "; ".join(f"{fault.what} ({fault.source})" for fault in faults)
            advice = (
                "pip install nvidia-cuda-nvcc, and set TRITON_PTXAS_PATH to its ptxas, or TRITON_PTXAS_BLACKWELL_PATH "
                "from sm_100 on, if results are wrong"
            )
            yield _group.warning(f"ptxas for {arch}", f"{found}; reported with it: {reports}", advice, same=version)
        else:
            yield _group.ok(f"ptxas for {arch}", found, same=version)
