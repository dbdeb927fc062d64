"""CPU time of a fused block's forward and backward pass, against the same block in plain PyTorch.

    python -m benchmarks.host_cost

While a GPU computes, the host prepares the next launches; where it takes longer than the GPU, the GPU waits. No GPU is
needed to measure that: tensors are tiny and on the CPU, and Triton's driver is replaced by one that neither compiles
nor runs, so that all of the package, PyTorch and Triton runs but the last call into the driver. What the driver takes,
a few microseconds per launch, is left out on both sides.

The block's Triton kernels are also launched by themselves, with the same arguments, by `fastvit_kernels.launch` and by
Triton's own `kernel[grid](...)`.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.launches import launched_by
from fastvit_kernels import FusedBlock, dispatch
from fastvit_kernels.block import op
from fastvit_kernels.launch import launch

WIDTH, HEADS, HIDDEN, TOKENS = (
    64,
    2,
    128,
    2,
)  # as small as the kernels' arguments allow: the CPU's own products are next to nothing
RESULT = Path("benchmarks/results/cpu/host_cost.json")


class PlainBlock(nn.Module):
    """A pre-norm block written with PyTorch's functions, as in timm."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.proj(attended)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def run_nothing(*arguments: Any) -> None:
    """Stands for the driver's launch."""


def new_kernel() -> CompiledKernel:
    """Stands for a compiled kernel. Launching it does nothing."""
    kernel = CompiledKernel.__new__(CompiledKernel)
    kernel.module, kernel.function, kernel.packed_metadata, kernel._run = object(), None, None, run_nothing
    kernel.name, kernel.src = "", None
    return kernel


class Driver:
    """Stands for the driver of an H200."""

    def __init__(self) -> None:
        self.target = GPUTarget("cuda", 90, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return "host_cost"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def without_gpu() -> Iterator[None]:
    """Inside, the kernels' path runs on CPU tensors, and a launch ends where the driver would start."""
    if knobs.runtime.interpret:
        raise RuntimeError("host_cost measures launches, and TRITON_INTERPRET=1 replaces them: unset it")

    def no_compilation(kernel: Any, key: Any, signature: Any, device: Any, *others: Any) -> CompiledKernel:
        assert kernel.cache_key  # finds the globals that each launch checks
        return kernel.device_caches[device][0].setdefault(key, new_kernel())

    compile_kernel, active, uses_triton = JITFunction._do_compile, driver._active, op.uses_triton
    registrations = torch.library.Library("fastvit", "IMPL")
    for operator, function in (
        ("transformer_block", op.launch_forward),
        ("transformer_block_backward", op.launch_backward),
    ):
        registrations.impl(operator, function, "CPU")
    JITFunction._do_compile = no_compilation
    driver.set_active(Driver())
    op.uses_triton = lambda *arguments: True
    try:
        with dispatch.compiling_for(dispatch.Gpu("sm_90", 132, "H200")):
            yield
    finally:
        op.uses_triton, JITFunction._do_compile, driver._active = uses_triton, compile_kernel, active
        registrations._destroy()


def pass_of(block: nn.Module, x: Tensor) -> tuple[Callable[[], Tensor], Callable[[Tensor], None]]:
    """Forward and backward pass of the block, to be called in turn."""
    parameters = list(block.parameters())
    gradient = torch.ones_like(x)

    def backward(y: Tensor) -> None:
        torch.autograd.grad(y, [x, *parameters], gradient)

    return lambda: block(x), backward


Launch = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]  # kernel, grid, arguments, constants


def launches_of(forward: Callable[[], Tensor], backward: Callable[[Tensor], None]) -> list[Launch]:
    """The Triton launches of both passes."""
    found: list[Launch] = []

    def note(run: Any, kernel: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **constants: Any) -> None:
        found.append((kernel, grid, arguments, constants))

    with launched_by(note):
        backward(forward())
    return found


def measure_launches(launches: list[Launch], rounds: int, calls: int) -> dict[str, Any]:
    """Microseconds of CPU time per launch, the median of `rounds` rounds, by `launch` and by Triton alone, in turns."""

    def by_launch() -> None:
        for kernel, grid, arguments, constants in launches:
            launch(kernel, grid, *arguments, **constants)

    def by_triton() -> None:
        for kernel, grid, arguments, constants in launches:
            kernel[grid](*arguments, **constants)

    times: dict[str, list[float]] = {"launch_us": [], "triton_us": []}
    for _ in range(rounds):
        for name, run in (("launch_us", by_launch), ("triton_us", by_triton)):
            start = time.thread_time_ns()
            for _ in range(calls):
                run()
            times[name].append((time.thread_time_ns() - start) / calls / len(launches) / 1e3)
    bound, get_item = [], JITFunction.__getitem__

    def noted(kernel: Any, grid: Any) -> Any:
        bound.append(kernel)
        return get_item(kernel, grid)

    JITFunction.__getitem__ = noted
    try:
        by_launch()
    finally:
        JITFunction.__getitem__ = get_item
    medians = {name: round(statistics.median(taken), 1) for name, taken in times.items()}
    return {"count": len(launches), "left_to_triton": len(bound)} | medians


def measure(rounds: int, calls: int) -> dict[str, Any]:
    """Microseconds of this thread's CPU time per call, the median of `rounds` rounds, taken in turns."""
    torch.manual_seed(0)
    x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    blocks = {
        "plain": PlainBlock(WIDTH, HEADS, HIDDEN),
        "fused": FusedBlock(WIDTH, HEADS, HIDDEN),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in blocks}
    with without_gpu():
        passes = {name: pass_of(block, x) for name, block in blocks.items()}
        for forward, backward in passes.values():
            for _ in range(calls):
                backward(forward())
        for _ in range(rounds):
            for name, (forward, backward) in passes.items():
                spent = [0, 0]
                for _ in range(calls):
                    start = time.thread_time_ns()
                    y = forward()
                    middle = time.thread_time_ns()
                    backward(y)
                    spent[0] += middle - start
                    spent[1] += time.thread_time_ns() - middle
                times[name].append((spent[0] / calls / 1e3, spent[1] / calls / 1e3))
        by_launch = measure_launches(launches_of(*passes["fused"]), rounds, calls)
    results = {
        name: {
            "forward_us": round(statistics.median(forward for forward, _ in rows), 1),
            "backward_us": round(statistics.median(backward for _, backward in rows), 1),
            "both_us": round(statistics.median(sum(row) for row in rows), 1),
        }
        for name, rows in times.items()
    }
    ratios = [sum(fused) / sum(plain) for fused, plain in zip(times["fused"], times["plain"], strict=True)]
    return {
        "measures": "CPU time of the calling thread per block; driver mocked, tensors tiny, float32",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "load_average": round(os.getloadavg()[0], 1),
        "rounds": rounds,
        "calls": calls,
        "blocks": results,
        "launches": by_launch,
        "ratio": round(statistics.median(ratios), 2),
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{'block':<8}{'forward µs':>12}{'backward µs':>13}{'both µs':>10}"]
    for name, row in result["blocks"].items():
        lines.append(f"{name:<8}{row['forward_us']:>12.0f}{row['backward_us']:>13.0f}{row['both_us']:>10.0f}")
    launches = result["launches"]
    lines.append(
        f"{launches['count']} Triton launches: {launches['launch_us']:.1f} µs each,"
        f" {launches['triton_us']:.1f} by Triton's own way"
    )
    lines.append(f"fused takes {result['ratio']:.2f} times the CPU time of plain PyTorch ({result['measures']})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_cost", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--calls", type=int, default=100, help="per block and round, default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write, default: %(default)s")
    parsed = parser.parse_args()
    result = measure(parsed.rounds, parsed.calls)
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    parsed.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
