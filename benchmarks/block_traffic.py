"""What one Transformer block launches and moves, forward and backward, and the least time that takes on a GPU.

    python -m benchmarks.block_traffic
    python -m benchmarks.block_traffic --out benchmarks/results/model/blocks.json

Traces `fastvit_kernels.FusedBlock` on tensors without data, so it needs no GPU: the block's own code runs, and every
Triton kernel, matrix product and other PyTorch operator that it would launch is written down. Each tensor of a launch
is counted once, at its full size: an input is read, an output written, and what is changed in place is both. A launch
takes at least

    max(bytes / COPY_BYTES_PER_SECOND, FLOPs / PRODUCT_FLOPS)

so the times are calculated, not measured. `benchmarks.step_model` makes a training step of them.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import flop_registry

from benchmarks.launches import launched_by
from benchmarks.machine import commit
from benchmarks.shapes import GPU_SHAPES, Shape
from fastvit_engine.files import atomic_write
from fastvit_kernels import FusedBlock, dispatch
from fastvit_kernels.gemm import quack
from fastvit_kernels.modules import Recompute
from fastvit_kernels.tuning.codegen import TARGETS

# One H200: a copy on the device, bytes read and written together, and an 8192 x 8192 x 8192 product of random bf16.
COPY_BYTES_PER_SECOND = 4.3e12
PRODUCT_FLOPS = 790e12
# Products of [tokens, tokens, head dimension] per head. The backward pass computes the scores once per kernel.
ATTENTION_PRODUCTS = {
    "attention_fwd_kernel": 2,
    "attention_bwd_query_kernel": 3,
    "attention_bwd_key_kernel": 4,
}
PRODUCTS, ATTENTION, ELEMENTWISE = "products", "attention", "elementwise"
ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "alias"}


@dataclass(frozen=True)
class Launch:
    """One kernel: what it is for, what it moves and multiplies, and its least time."""

    during: str  # the forward or the backward pass
    name: str  # of the Triton kernel or of PyTorch's operator
    library: str  # triton, cublas, quack or torch
    kind: str  # products, attention or elementwise
    bytes: int
    flops: int

    @property
    def microseconds(self) -> float:
        return 1e6 * max(self.bytes / COPY_BYTES_PER_SECOND, self.flops / PRODUCT_FLOPS)


class Setting(NamedTuple):
    """How a block is trained."""

    autocast: bool  # float32 weights and stream under autocast to bf16, or all in bf16
    recompute: Recompute
    quack: bool = False  # QuACK runs the products with GELU
    sums_apart: bool = False  # and the columns of fc1's gradient are added up in a pass of their own


SETTINGS = {
    "bf16": Setting(False, "gelu"),
    "bf16, nothing recomputed": Setting(False, "none"),
    "bf16, QuACK": Setting(False, "gelu", quack=True),
    "bf16, QuACK, nothing recomputed": Setting(False, "none", quack=True),
    "bf16, QuACK, sums apart": Setting(False, "gelu", quack=True, sums_apart=True),
    "autocast": Setting(True, "gelu"),
    "autocast, nothing recomputed": Setting(True, "none"),
    "autocast, QuACK": Setting(True, "gelu", quack=True),
    "autocast, QuACK, nothing recomputed": Setting(True, "none", quack=True),
}


def trace(shape: Shape, batch: int, setting: Setting, outputs: int | None = None) -> list[Launch]:
    """Every launch of one block, in order; `outputs` as in FusedBlock.

    Raises ValueError for a kernel that this module cannot count.
    """
    stream = torch.float32 if setting.autocast else torch.bfloat16
    with torch.device("meta"):
        block = FusedBlock(shape.width, shape.heads, shape.mlp_dim, recompute=setting.recompute).to(stream)
        x = torch.empty(batch, shape.tokens, shape.width, dtype=stream, requires_grad=True)
        grad = torch.empty_like(x[:, :outputs])
    product = 2 * batch * shape.heads * (outputs or shape.tokens) * shape.tokens * shape.head_dim
    record = Record(product)
    with recording(record, autocast=setting.autocast), multiplied_by(setting, record):
        y = block(x, outputs=outputs)
        record.during = "backward"
        torch.autograd.grad(y, [x, *block.parameters()], grad)
    if not any(launch.library == "triton" for launch in record.launches):
        raise RuntimeError("the block launched no Triton kernel: FASTVIT_KERNELS must not be 'reference' for a trace")
    return record.launches


class Record:
    """Launches so far."""

    def __init__(self, attention_product: int) -> None:
        self.launches: list[Launch] = []
        self.during = "forward"
        self._attention_product = attention_product

    def kernel(self, kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        """Takes the place of a Triton kernel's `run`."""
        name = kernel.fn.__name__
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        tensors = [getattr(value, "base", value) for value in tree_iter(list(given.values()))]  # `base` of a descriptor
        moved = sum(value.nbytes for value in tensors if isinstance(value, Tensor))
        if name in ATTENTION_PRODUCTS:
            self._add(name, "triton", ATTENTION, moved, ATTENTION_PRODUCTS[name] * self._attention_product)
        elif name == "gemm_kernel":
            m, n, k = (int(given[size]) for size in ("m", "n", "k"))
            self._add(name, "triton", PRODUCTS, moved, 2 * m * n * k)
        elif "attention" in name:
            raise ValueError(f"how much {name} multiplies is not known: add it to ATTENTION_PRODUCTS in {__file__}")
        else:
            self._add(name, "triton", ELEMENTWISE, moved, 0)

    def operator(self, op: Any, arguments: tuple[Any, ...], options: Mapping[str, Any], result: Any) -> None:
        name = op.overloadpacket.__name__.strip("_")
        if op.is_view or name in ALLOCATIONS or op.overloadpacket.__name__ in ALLOCATIONS:
            return
        counted = flop_registry.get(op.overloadpacket)
        flops = counted(*arguments, **options, out_val=result) if counted else 0
        # what is changed in place is an argument and the result: read and written
        moved = sum(t.nbytes for t in tree_iter((arguments, options, result)) if isinstance(t, Tensor))
        if moved == 0:
            return
        attends = "attention" in name
        library = "cublas" if counted and not attends else "torch"
        self._add(name, library, ATTENTION if attends else PRODUCTS if counted else ELEMENTWISE, moved, flops)

    def quack(self, call: quack.Call) -> None:
        """Takes the place of a launch of QuACK."""
        moved = sum(tensor.nbytes for tensor in call.tensors if tensor is not None)
        (m, k), n = call.a.shape, call.b.shape[1]
        self._add(f"gemm, {call.product}", "quack", PRODUCTS, moved, 2 * m * n * k)

    def _add(self, name: str, library: str, kind: str, moved: int, flops: int) -> None:
        self.launches.append(Launch(self.during, name, library, kind, moved, flops))


@contextmanager
def recording(record: Record, *, autocast: bool) -> Iterator[None]:
    """Inside, tensors without data pass for those of an H200, and what they would launch is recorded."""
    enabled = torch.is_autocast_enabled("cuda")
    try:
        torch.set_autocast_enabled("cuda", autocast)
        with (
            warnings.catch_warnings(action="ignore", category=UserWarning),  # autocast, of a GPU that is not there
            launched_by(lambda run, kernel, *arguments, **options: record.kernel(kernel, *arguments, **options)),
            dispatch.compiling_for(TARGETS["sm_90"].gpu),
            PosesAsCuda(),
            Operators(record),
        ):
            yield
    finally:
        torch.set_autocast_enabled("cuda", enabled)


@contextmanager
def multiplied_by(setting: Setting, record: Record) -> Iterator[None]:
    """Inside, QuACK runs the products with GELU if the setting says so."""
    if not setting.quack:
        yield
        return
    how = quack.pinned.default("gelu", torch.bfloat16, 1, 1, 1, TARGETS["sm_90"].gpu)
    pinned = quack.pinned.forcing(how._replace(column_sums=not setting.sums_apart))
    with dispatch.using("gemm=quack"), quack.launched_by(record.quack), pinned:
        yield


class PosesAsCuda(TorchFunctionMode):
    """Tensors without data say that they are on a GPU, and what asks for a GPU gets tensors without data."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        if function == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if function == torch.Tensor.device.__get__:
            return torch.device("cuda", 0)
        elsewhere = lambda device: torch.device("meta") if device.type == "cuda" else device  # noqa: E731
        arguments, options = tree_map_only(torch.device, elsewhere, (arguments, options or {}))
        if function is F.linear and torch.is_autocast_enabled("cuda"):  # which does not act without data
            arguments = tree_map_only(Tensor, lambda tensor: tensor.to(torch.bfloat16), arguments)
        return function(*arguments, **options)


class Operators(TorchDispatchMode):
    """Records PyTorch's operators; this package's own run their launch functions, which a tensor without data skips."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self._record = record

    def __torch_dispatch__(self, op: Any, types: Any, arguments: tuple[Any, ...] = (), options: Any = None) -> Any:
        on_gpu = torch._C.DispatchKey.CUDA
        if op.namespace == "fastvit" and op.has_kernel_for_dispatch_key(on_gpu):
            with self:
                return op._op_dk(on_gpu, *arguments, **(options or {}))
        with self:
            result = op.decompose(*arguments, **(options or {}))  # `to` and the like, into what launches
        if result is not NotImplemented:
            return result
        result = op(*arguments, **(options or {}))
        self._record.operator(op, arguments, options or {}, result)
        return result


# ---- tables


def totals(launches: Sequence[Launch]) -> dict[str, Any]:
    """Launches, bytes, FLOPs and milliseconds of a block, together, by what they are for, and of QuACK's products."""

    def of(some: Sequence[Launch]) -> dict[str, Any]:
        return {
            "launches": len(some),
            "bytes": sum(launch.bytes for launch in some),
            "flops": sum(launch.flops for launch in some),
            "ms": 1e-3 * sum(launch.microseconds for launch in some),
        }

    kinds = (PRODUCTS, ATTENTION, ELEMENTWISE)
    parts = {kind: [launch for launch in launches if launch.kind == kind] for kind in kinds}
    parts["quack"] = [launch for launch in launches if launch.library == "quack"]
    return of(launches) | {name: of(some) for name, some in parts.items()}


def table(launches: Sequence[Launch]) -> str:
    lines = [f"{'pass':<10}{'launch':<34}{'by':<8}{'MB':>9}{'GFLOP':>9}{'us':>9}"]
    for launch in launches:
        flops = f"{launch.flops / 1e9:,.0f}" if launch.flops else ""
        lines.append(
            f"{launch.during:<10}{launch.name:<34}{launch.library:<8}{launch.bytes / 1e6:>9,.0f}{flops:>9}"
            f"{launch.microseconds:>9,.0f}"
        )
    return "\n".join(lines)


def summary(total: Mapping[str, Any]) -> str:
    parts = ", ".join(
        f"{kind} {total[kind]['bytes'] / 1e9:.2f} GB in {total[kind]['launches']} launches"
        for kind in (PRODUCTS, ATTENTION, ELEMENTWISE)
    )
    return f"{total['launches']} launches, {total['bytes'] / 1e9:.2f} GB, at least {total['ms']:.2f} ms: {parts}"


def json_file(name: str) -> Path:
    """For argparse: a file that leaves room for a .txt of the same name."""
    if Path(name).suffix != ".json":
        raise argparse.ArgumentTypeError(f"{name} must end in .json: the text is written beside it")
    return Path(name)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.block_traffic",
        description="Trace one Transformer block without a GPU: launches, bytes, FLOPs and least time of both passes.",
        epilog="example: python -m benchmarks.block_traffic --batch 64 --settings bf16",
    )
    shapes = {shape.name: shape for shape in GPU_SHAPES}
    parser.add_argument("--model", choices=shapes, default="H/14", help="default H/14")
    parser.add_argument("--batch", type=int, default=256, help="images (default 256)")
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME", help=", ".join(SETTINGS)
    )
    parser.add_argument(
        "--out", type=json_file, metavar="FILE.json", help="write the launches as JSON, and as text beside it"
    )
    parsed = parser.parse_args(arguments)
    if parsed.batch < 1:
        parser.error(f"--batch is {parsed.batch}: give at least 1")
    text, blocks = [f"One block of ViT-{parsed.model}, {parsed.batch} images; calculated, not measured."], {}
    for name in parsed.settings:
        launches = trace(shapes[parsed.model], parsed.batch, SETTINGS[name])
        last = totals(trace(shapes[parsed.model], parsed.batch, SETTINGS[name], outputs=1))
        total = totals(launches)
        blocks[name] = {"totals": total, "last": last, "launches": [asdict(launch) for launch in launches]}
        text += ["", f"{name}: {summary(total)}", f"the last one, for the class token alone: {summary(last)}"]
        text += ["", table(launches)]
    print("\n".join(text))
    if parsed.out:
        found = {"model": parsed.model, "batch": parsed.batch, "commit": commit(), "blocks": blocks}
        parsed.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(parsed.out, json.dumps(found, indent=1) + "\n")
        atomic_write(parsed.out.with_suffix(".txt"), "\n".join(text) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
