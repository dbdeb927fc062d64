"""A training step can be one CUDA graph: it reads no value back, and takes none from the host that changes.

There is no GPU here. `test_the_same_launches_at_every_step` traces what a step would launch on one. The other tests
capture a step in a stand-in for a CUDA graph, see `tests/stand_in_graph.py`.
"""

from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks.block_traffic import Record, recording
from benchmarks.cuda_graph import WARM_UP, Captured
from benchmarks.registry import Unusable
from benchmarks.shapes import Shape
from benchmarks.train_variants import Setup, bare_loop, fastvit_graph, graph_step, resident_batches
from fastvit_engine.distributed.world import World
from fastvit_kernels import FusedBlock, attention, dispatch
from tests.in_full import in_full
from tests.stand_in_graph import StandIn, graphs

__all__ = ["graphs"]  # a fixture

SHAPE = Shape("tiny/8@16", 8, 16, 32, 2, 64, 2, (4,))
CPU = Setup(SHAPE, 4, "fp32", World(0, 1, torch.device("cpu")))


class Launches(Record):
    """All that a launch is given: sizes of tensors, and numbers as they are."""

    def __init__(self) -> None:
        super().__init__(attention_product=1)
        self.seen: list[Any] = []

    def kernel(self, kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        self.seen.append((kernel.fn.__name__, grid, tree_map(look, (arguments, options))))

    def operator(self, op: Any, arguments: Any, options: Any, result: Any) -> None:
        if op.namespace != "profiler":
            self.seen.append((str(op), tree_map(look, (arguments, dict(options)))))


def look(value: Any) -> Any:
    tensor = getattr(value, "base", value)  # `base` of a descriptor
    return (tensor.dtype, tensor.shape, tensor.stride()) if isinstance(tensor, Tensor) else repr(value)


def traced(build: Callable[[], Callable[[], Any]], autocast: bool) -> tuple[list[Any], list[Any]]:
    """The launches of two steps that follow the first, on tensors without data that pass for those of a GPU."""
    record, steps = Launches(), []
    with recording(record, autocast=autocast):
        step = build()
        for seed in range(3):
            torch.manual_seed(seed)
            record.seen = []
            step()
            steps.append(record.seen)
    return steps[1], steps[2]


def whole_step() -> Callable[[], Any]:
    step = graph_step(Setup(SHAPE, 4, "fp32", World(0, 1, torch.device("cuda", 0))))
    images = torch.empty(4, 16, 16, 3, dtype=torch.uint8, device="meta")
    return lambda: step(images, torch.empty(4, dtype=torch.int64, device="meta"))


def random_parts() -> Callable[[], Any]:
    with torch.device("meta"):
        blocks = [
            FusedBlock(32, 2, 64, drop_path=0.5),
            FusedBlock(32, 2, 64, dropout=0.5),
            FusedBlock(32, 2, 64, drop_path=0.5, drop_path_mode="subset"),
        ]
        x = torch.empty(4, 5, 32, requires_grad=True)

    def step() -> None:
        y = x
        for block in blocks:
            y = block.train()(y)
        y = attention(y.view(4, 5, 1, 2, 16).expand(-1, -1, 3, -1, -1), dropout=0.5)
        y.backward(torch.empty_like(y))

    return step


@pytest.mark.parametrize(
    ("build", "autocast"),
    [(whole_step, True), in_full(whole_step, False), (random_parts, False), in_full(random_parts, True)],
)
def test_the_same_launches_at_every_step(build: Callable[[], Callable[[], Any]], autocast: bool) -> None:
    """Seeds and rates that are drawn, and Adam's count of steps, are on the device; reading a value would raise."""
    with dispatch.using("triton"):
        first, second = traced(build, autocast)
    kernels = [name for name, *_ in first if name.endswith("_kernel")]
    assert "attention_fwd_kernel" in kernels and "attention_bwd_key_kernel" in kernels
    assert first == second


def test_a_step_with_a_number_of_its_own_is_seen() -> None:
    steps, x = iter(range(9)), torch.empty(3, device="meta")
    first, second = traced(lambda: lambda: x + next(steps), autocast=False)
    assert len(first) == len(second) == 1 and first != second
    with pytest.raises(RuntimeError, match="meta"):
        traced(lambda: lambda: x.sum().item(), autocast=False)


def batches(setup: Setup) -> list[tuple[Tensor, Tensor]]:
    return [(batch.images, batch.labels) for batch in resident_batches(setup)]


@pytest.mark.parametrize("implementation", ["reference", in_full("triton")])
def test_replays_train_as_the_eager_loop_does(graphs: list[StandIn], implementation: str) -> None:
    given, steps = batches(CPU), WARM_UP + 3
    with dispatch.using(implementation):
        eager, captured = graph_step(CPU), Captured(graph_step(CPU))
        expected = [eager(*batch).item() for batch in islice(cycle(given), steps)]
        losses = [captured(*batch) for batch in islice(cycle(given), steps)]  # read at the end: none is written over
    assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-5)
    assert len(graphs) == 1 and len(set(expected)) == steps


def test_another_batch_size_begins_anew(graphs: list[StandIn]) -> None:
    captured = Captured(linear_step(rate=0.5))
    for size, calls, made in ((4, WARM_UP, 0), (4, 1, 1), (2, WARM_UP, 1), (2, 2, 2)):
        for _ in range(calls):
            captured(torch.rand(size, 3), torch.rand(size))
        assert len(graphs) == made


def test_a_replay_draws_anew_and_takes_the_new_batch(graphs: list[StandIn]) -> None:
    with torch.no_grad():
        block = FusedBlock(32, 2, 64, drop_path=0.5)
    step = bare_loop(CPU, block.train(), lambda x, y: (block(x) - y[:, None, None]).square().mean(), capturable=True)
    captured, x, y = Captured(lambda x, y: step(x, y)), torch.rand(8, 5, 32), torch.rand(8)
    losses = {captured(x, y).item() for _ in range(WARM_UP + 4)}
    assert len(losses) > WARM_UP + 1  # which of 8 samples were dropped
    assert captured(x, y + 100).item() > 1000


def test_a_step_that_reads_a_value_is_refused_and_not_replayed(graphs: list[StandIn]) -> None:
    captured = Captured(lambda images, labels: images.sum() * labels.max().item())
    batch = torch.ones(2), torch.ones(2)
    for _ in range(WARM_UP):
        captured(*batch)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="capturing"):
            captured(*batch)


def linear_step(rate: float) -> Callable[[Tensor, Tensor], Tensor]:
    layer = nn.Linear(3, 1)
    return bare_loop(CPU, layer, lambda x, y: (layer(x)[:, 0] - y).square().mean() * rate, capturable=True)


def test_it_needs_a_gpu() -> None:
    with pytest.raises(Unusable, match="needs a GPU"):
        fastvit_graph(CPU)
