"""What QuACK's compiler makes of our epilogues: registers, spills and matrix instructions, without a GPU.

    python -m benchmarks.quack_codegen
    python -m benchmarks.quack_codegen --target sm_90 --out benchmarks/results/codegen

Needs `pip install quack-kernels`. For each product that QuACK may run, and each tile that the tuner tries, a kernel is
compiled for ViT-H/14. Each process compiles for one target, since QuACK reads it when it is imported.
"""

import argparse
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.machine import ROOT
from benchmarks.shapes import GPU_SHAPES
from fastvit_engine.files import atomic_write
from fastvit_kernels.dispatch import compiling_for, gpu
from fastvit_kernels.gemm import quack
from fastvit_kernels.gemm.quack import Call, Pinned
from fastvit_kernels.gemm.tuning import quack_candidates
from fastvit_kernels.libraries import ARCHITECTURES, QUACK, unusable
from fastvit_kernels.registration import cdiv
from fastvit_kernels.tuning import codegen, sass
from fastvit_kernels.tuning.codegen import TARGETS, cuobjdump

SHAPE, BATCH = GPU_SHAPES[0], 256
CLUSTERS = 66  # of two multiprocessors that run at the same time: asked of a GPU, and no part of the machine code


class Kernel(NamedTuple):
    """A compiled kernel."""

    product: str
    epilogue: str
    tile: str
    registers: int
    stack_bytes: int
    spill_stores: int
    spill_loads: int
    matrix_instructions: int
    waits: int
    hazards: int


def compile_all(target: str, dump: Path) -> Iterator[Kernel]:
    """Every product, epilogue and way to run it."""
    environment = {"QUACK_ARCH": target.removeprefix("sm_"), "CUTE_DSL_ARCH": f"{target}a"}
    environment |= {"QUACK_CACHE_ENABLED": "0", "CUTE_DSL_KEEP": "cubin", "CUTE_DSL_DUMP_DIR": str(dump)}
    os.environ |= environment  # before QuACK is imported
    if (reason := unusable()) is not None:
        raise RuntimeError(f"{reason}: pip install quack-kernels")
    with compiling_for(TARGETS[target].gpu):
        found = ways(target)
        for how in found:
            for tanh in (False, True) if how in (found[0], found[-1]) else (False,):
                for name, call in calls(how, tanh).items():
                    yield compiled(name, call, dump, target)


def ways(target: str) -> list[Pinned]:
    """The default, each tile that the tuner tries, and QuACK's own default on sm_90.

    Clusters are compiled as the default has them, and who adds up columns is not a matter of the tile.
    """
    on = TARGETS[target].gpu
    found = [quack.pinned.default("gelu", torch.bfloat16, 1, 1, 1, on), *quack_candidates("gelu", on)]
    found += [Pinned(128, 192, True, 2, 1)] if target == "sm_90" else []
    return list({how[:3]: how for how in reversed(found)}.values())[::-1]


def calls(how: Pinned, tanh: bool) -> Mapping[str, Call]:
    """By what the epilogue writes."""
    rows, width, hidden = BATCH * SHAPE.tokens, SHAPE.width, SHAPE.mlp_dim
    tiles = cdiv(rows, quack.rows_of_tile(how, gpu(torch.device("meta"))))

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    wide = meta(rows, hidden)
    forward = Call("gelu", tanh, meta(rows, width), meta(hidden, width).T, meta(hidden), wide, wide, None, how)
    backward = Call(
        "gelu gradient", tanh, meta(rows, width), meta(width, hidden), wide, wide, wide,
        meta(tiles, hidden, dtype=torch.float32), how,
    )  # fmt: skip
    return {
        "pre, GELU": forward,
        "gradient, GELU, column sums": backward,
        "gradient, column sums": backward._replace(post=None),
        "gradient, GELU": backward._replace(sums=None),
    }


def compiled(name: str, call: Call, dump: Path, target: str) -> Kernel:
    """Compiles what `quack.launch` would launch. QuACK leaves the machine code in `dump`."""
    for left in dump.iterdir():
        left.unlink()
    made = quack.prepared(call)
    host: Any = importlib.import_module("quack.gemm_runtime.host")
    host.get_max_active_clusters = lambda *_: CLUSTERS
    made.epilogue.plan(*made.matrices, out=made.out, config=made.config, **made.operands)
    (path,) = dump.glob("*.cubin")
    cubin = path.read_bytes()
    usage, text = cuobjdump(cubin, "-res-usage"), cuobjdump(cubin, "-sass")
    how = call.pinned
    schedule = "in turns" if how.pingpong else "together"
    return Kernel(
        call.product,
        name + (", tanh" if call.tanh else ""),
        f"{how.tile_m} x {how.tile_n}, {schedule}, cluster {how.cluster_m} x {how.cluster_n}",
        registers=codegen.number(r"REG:(\d+)", usage),
        stack_bytes=codegen.number(r"STACK:(\d+)", usage),
        spill_stores=len(re.findall(r"\bSTL\b", text)),
        spill_loads=len(re.findall(r"\bLDL\b", text)),
        matrix_instructions=len(re.findall(r"\bHGMMA\b" if target == "sm_90" else r"\bUTC\w*MMA\b", text)),
        waits=sass.waits(text),
        hazards=sass.hazards(text) if target == "sm_90" else 0,
    )


def markdown(target: str, kernels: Sequence[Kernel]) -> str:
    lines = [
        f"# What QuACK's compiler made of each epilogue on {target}",
        "",
        f"{QUACK} {version(QUACK)}, nvidia-cutlass-dsl {version('nvidia-cutlass-dsl')}; ViT-H/14 in bf16."
        " Compiled without a GPU by `python -m benchmarks.quack_codegen`. Instructions are counted statically. No speed"
        " follows from these figures.",
        "",
        "| " + " | ".join(name.replace("_", " ") for name in Kernel._fields) + " |",
        "|" + "---|" * len(Kernel._fields),
    ]
    return "\n".join([*lines, *("| " + " | ".join(map(str, kernel)) + " |" for kernel in kernels)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quack_codegen",
        description="Compile the epilogues that QuACK runs for us, without a GPU, and tabulate registers and spills.",
        epilog="example: python -m benchmarks.quack_codegen --target sm_100",
    )
    parser.add_argument("--target", choices=ARCHITECTURES, default=ARCHITECTURES[0], help="default sm_90")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "codegen",
        metavar="DIR",
        help="for quack-TARGET.md",
    )
    parsed = parser.parse_args(arguments)
    kernels = []
    try:
        with tempfile.TemporaryDirectory() as dump:
            for kernel in compile_all(parsed.target, Path(dump)):
                kernels.append(kernel)
                print(*kernel, sep=", ", flush=True)
    except RuntimeError as error:
        print(f"quack_codegen: {error}", file=sys.stderr)
        return 2
    parsed.out.mkdir(parents=True, exist_ok=True)
    atomic_write(parsed.out / f"quack-{parsed.target}.md", markdown(parsed.target, kernels))
    return 0


if __name__ == "__main__":
    sys.exit(main())
