"""What DeepSpeed does to gradients and weights in one step, besides the model's own passes: counted, not timed.

    python -m benchmarks.deepspeed_copies
    python -m benchmarks.deepspeed_copies --out benchmarks/results/model/deepspeed.json

Trains a small model through the engine of `fastvit train`, as the only process, on the CPU. Of one step it writes down
every PyTorch operator, with the bytes that it reads and writes, and subtracts what the same forward and backward passes
issue without DeepSpeed. The rest is per parameter, so it holds for a model of any size: `ms` is its least time for
ViT-H/14 on one H200 at the copy rate of `benchmarks.step_model`, calculated. The update itself is not in it.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks.block_traffic import ALLOCATIONS, json_file
from benchmarks.machine import commit
from benchmarks.shapes import Shape
from benchmarks.step_model import BYTES_PER_SECOND, PARAMETERS
from benchmarks.train_variants import Setup, resident_batches
from fastvit_engine.data.stream.batch_split import split_batch
from fastvit_engine.distributed.supervise import free_port, rank_environment
from fastvit_engine.distributed.world import World, join_world
from fastvit_engine.engine.build import build_engine
from fastvit_engine.files import atomic_write
from fastvit_kernels import FusedCrossEntropy

SHAPE = Shape("small", 8, 32, 64, 2, 256, 2, (8,))
NETWORK = "network"  # the collective operation itself, which a single GPU skips
KINDS = ("accumulation", "reduction", NETWORK, "norm", "clipping", "zeros", "copies")
COLLECTIVES = ("allreduce_", "_allgather_base_", "_reduce_scatter_base_", "allgather_", "reduce_")
OF_NORMS = ("stack", "pow", "sum", "isinf", "isnan", "abs", "any", "where")  # of one norm per tensor
SCALARS = 64  # bytes of a step's operator, at the most, that only decides what follows
OF_THE_STEP = {
    "norm": ("norm", "linalg_vector_norm", "amax", "amin", "masked_fill_", "full_like", *OF_NORMS),
    "clipping": ("mul_", "mul", "div_", "div", "reciprocal", "clamp", "add"),
    "zeros": ("zero_", "zeros", "zeros_like", "fill_"),
    "copies": ("copy_", "_to_copy", "cat", "clone"),
}


class Case(NamedTuple):
    """A way to train."""

    stage: int
    precision: str
    clips: bool = True  # the norm of the gradients is above the limit
    reduces: bool = False  # as if there were other processes

    @property
    def name(self) -> str:
        options = ("" if self.clips else "norm below the limit", "as several processes do" if self.reduces else "")
        return ", ".join(filter(None, (f"ZeRO-{self.stage} {self.precision}", *options)))


CASES = (
    Case(0, "fp32"),
    Case(0, "bf16"),
    Case(1, "fp32"),
    Case(1, "bf16"),
    Case(1, "bf16", clips=False),
    Case(1, "bf16", reduces=True),
    Case(2, "bf16"),
)


class Operator(NamedTuple):
    """An operator in a phase of the step, with what it reads and writes, in bytes."""

    phase: str  # "backward", "reduction" or "step"
    name: str
    read: int
    written: int

    @property
    def kind(self) -> str:
        """Raises ValueError for one that no step issued when this was written."""
        name = self.name.removeprefix("_foreach_")
        if name in COLLECTIVES:
            return NETWORK
        if self.phase != "step":
            return "accumulation" if self.phase == "backward" else "reduction"
        for kind, names in OF_THE_STEP.items():
            if name in names or self.read + self.written <= SCALARS:
                return kind
        raise ValueError(f"{self.name} is of no known kind: add it to OF_THE_STEP in {__file__}")


class Operators(TorchDispatchMode):
    """Counts those that move data outside of updates, each tensor once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Operator] = Counter()
        self.phase = "backward"
        self.updates = False

    def __torch_dispatch__(self, op: Any, types: Any, arguments: tuple[Any, ...] = (), options: Any = None) -> Any:
        result = op(*arguments, **(options or {}))
        name = op.overloadpacket.__name__
        if not (self.updates or op.is_view or name in ALLOCATIONS or name.strip("_") in ALLOCATIONS):
            read, written = traffic(op, arguments, result)
            if read + written:
                self.seen[Operator(self.phase, name, read, written)] += 1
        return result

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        yield
        self.phase = before


def traffic(op: Any, arguments: Sequence[Any], result: Any) -> tuple[int, int]:
    """Bytes that an operator reads and writes."""
    read = written = 0
    changes = any(argument.is_write for argument in op._schema.arguments)
    overwrites = op.overloadpacket.__name__.removeprefix("_foreach_") in ("zero_", "fill_", "copy_")
    for argument, given in zip(op._schema.arguments, arguments, strict=False):
        size = sum(tensor.nbytes for tensor in tree_iter(given) if isinstance(tensor, Tensor))
        read += 0 if argument.is_write and overwrites else size
        written += size if argument.is_write else 0
    if not changes:
        written = sum(tensor.nbytes for tensor in tree_iter(result) if isinstance(tensor, Tensor))
    return read, written


def measure(case: Case, world: World) -> dict[str, Any]:
    """Bytes per parameter and step by kind, and how many operators of it there are per tensor of parameters."""
    setup = Setup(SHAPE, SHAPE.batches[0], case.precision, world)
    limit = {"global_batch_size": setup.batch, "precision": case.precision, "grad_clip": 1e-3 if case.clips else 1e9}
    config = setup.config(zero={"stage": case.stage}, train=limit)
    plain, criterion = setup.our_model().train(), FusedCrossEntropy()
    engine = build_engine(setup.our_model(), config, split_batch(config, 1), world)
    engine.model.train()
    module: Any = engine.model
    module.enable_backward_allreduce |= case.reduces
    batch = resident_batches(setup)[0]
    plain.to(torch.bfloat16 if case.precision == "bf16" else torch.float32)
    kind, reduce = type(module), type(module).allreduce_gradients

    def step(operators: Operators) -> None:
        def reduced(*arguments: Any, **options: Any) -> Any:
            with operators.during("reduction"):
                return reduce(*arguments, **options)

        with patch.object(kind, "allreduce_gradients", reduced):
            engine.backward(criterion(engine.model(batch.images), batch.labels))
        with operators.during("step"):
            engine.step()

    def passes(operators: Operators) -> None:
        plain.zero_grad()
        criterion(plain(batch.images), batch.labels).backward()

    try:
        extra = issued(step, module.basic_optimizer) - issued(passes, None)
    finally:
        engine.close()
    parameters, tensors = sum(p.numel() for p in plain.parameters()), len(list(plain.parameters()))
    kinds = {kind: {"read": 0.0, "written": 0.0, "operators": 0.0} for kind in KINDS}
    for operator, count in extra.items():
        row = kinds[operator.kind]
        row["read"] += count * operator.read / parameters
        row["written"] += count * operator.written / parameters
        row["operators"] += count / tensors
    moved = sum(row["read"] + row["written"] for kind, row in kinds.items() if kind != NETWORK)
    return {"name": case.name, "kinds": kinds, "bytes": moved, "ms": milliseconds(moved)}


def issued(step: Callable[[Operators], None], optimizer: torch.optim.Optimizer | None) -> Counter[Operator]:
    """What the third step issues outside of this optimizer; the steps before it allocate."""
    step(Operators())
    step(Operators())
    with Operators() as operators:
        if optimizer is not None:
            optimizer.register_step_pre_hook(lambda *_: setattr(operators, "updates", True))
            optimizer.register_step_post_hook(lambda *_: setattr(operators, "updates", False))
        step(operators)
    return operators.seen


def milliseconds(bytes_per_parameter: float) -> float:
    """The least time for ViT-H/14."""
    return 1e3 * bytes_per_parameter * PARAMETERS / BYTES_PER_SECOND


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'':<36}" + "".join(f"{kind:>14}" for kind in KINDS) + f"{'all here':>10}{'ms':>7}"]
    for row in rows:
        moved = (row["kinds"][kind]["read"] + row["kinds"][kind]["written"] for kind in KINDS)
        lines.append(
            f"{row['name']:<36}{''.join(f'{size:>14.1f}' for size in moved)}{row['bytes']:>10.1f}{row['ms']:>7.1f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.deepspeed_copies",
        description="Count the bytes that DeepSpeed moves per parameter and step, and what for. Runs on the CPU.",
    )
    parser.add_argument("--out", type=json_file, metavar="FILE.json", help="write the counts as JSON")
    parsed = parser.parse_args(arguments)
    with patch.dict(os.environ, rank_environment(rank=0, processes=1, port=free_port())), join_world() as world:
        rows = [measure(case, world) for case in CASES]
    print(f"Bytes per parameter and step, without the update; all but {NETWORK}, and what they take ViT-H/14:")
    print(table(rows))
    if parsed.out:
        parsed.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(parsed.out, json.dumps({"commit": commit(), "cases": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
