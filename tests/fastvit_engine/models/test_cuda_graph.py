"""Captured passes train as eager ones do, and are captured, replayed and left out when they should be.

There is no GPU here: `tests/stand_in_graph.py` is in the place of a graph, around the real DeepSpeed engine.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastvit_engine.config import Config
from fastvit_engine.config.phases import Phase
from fastvit_engine.data import Batch
from fastvit_engine.data.stream.batch_split import BatchSplit
from fastvit_engine.engine.build import build_engine
from fastvit_engine.engine.deepspeed import import_deepspeed
from fastvit_engine.engine.protocol import TrainingEngine
from fastvit_engine.errors import UserError
from fastvit_engine.models import build_for_training
from fastvit_engine.models.cuda_graph import MOST, UNUSED, WARM_UP, capture_passes
from fastvit_engine.objectives import Phased, Taught, build_objective
from fastvit_engine.train.prepared_model import prepare_model
from fastvit_kernels import dispatch
from tests.in_full import only_in_full
from tests.stand_in_graph import StandIn, graphs

__all__ = ["graphs"]  # a fixture

TINY = {"name": "Ti/4", "image_size": 8, "width": 32, "depth": 2, "heads": 2, "num_classes": 10}
CPU = torch.device("cpu")
NOTHING: Mapping[str, Any] = MappingProxyType({})


def config(*, graph: bool, model: Mapping[str, Any] = NOTHING, train: Mapping[str, Any] = NOTHING, **of: Any) -> Config:
    trained = {"global_batch_size": 8, "precision": "fp32", "cuda_graph": graph} | dict(train)
    return Config.model_validate({"zero": {"stage": 0}, **of, "model": TINY | dict(model), "train": trained})


def engine_of(config: Config, world: Any, passes: int = 1) -> TrainingEngine:
    torch.manual_seed(0)
    model = build_for_training(config)
    if isinstance(model.head, nn.Linear):
        nn.init.normal_(model.head.weight, std=0.02)  # not zero, or it would learn alone
    prepare_model(model, config, CPU)
    engine = build_engine(model, config, BatchSplit(8, 1, passes), world)
    engine.model.train()
    return engine


def train(engine: TrainingEngine, steps: int, sizes: tuple[int, ...] = (8,)) -> list[float]:
    """Losses of steps of micro-batches of these sizes."""
    losses = []
    for step in range(steps):
        torch.manual_seed(step)  # as train.step does
        for number, size in enumerate(sizes):
            drawn = torch.Generator().manual_seed(100 * step + number)
            images = torch.randint(0, 256, (size, 8, 8, 3), generator=drawn, dtype=torch.uint8)
            labels = torch.randint(0, 10, (size,), generator=drawn)
            loss = nn.functional.cross_entropy(engine.model(images).float(), labels)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def weights(engine: TrainingEngine) -> dict[str, Tensor]:
    return {f"{part.name}/{part.start}": part.values.clone() for part in engine.master_weights()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_losses_and_weights_are_those_of_eager_passes(graphs: list[StandIn], lone_world, stage, precision):
    """To the bit, with drop path, two micro-batches a step and clipping, also while it captures."""
    trained = {}
    for graph in (False, True):
        how = {"precision": precision, "grad_clip": 0.1}
        settings = config(graph=graph, model={"drop_path": 0.5}, train=how, zero={"stage": stage})
        engine = engine_of(settings, lone_world, passes=2)
        trained[graph] = train(engine, 6, sizes=(4, 4)), weights(engine)
        engine.close()
    assert trained[True][0] == trained[False][0] and len(set(trained[True][0])) == 12
    assert all(torch.equal(trained[True][1][name], values) for name, values in trained[False][1].items())
    assert [graph.replays for graph in graphs] == [12 - WARM_UP] * 2  # forward, backward


@only_in_full
def test_the_kernels_of_a_gpu_are_captured_alike(graphs: list[StandIn], lone_world):
    with dispatch.using("triton"):
        test_losses_and_weights_are_those_of_eager_passes(graphs, lone_world, 1, "bf16")


@pytest.mark.parametrize(
    "section",
    [{}, {"timers": {"throughput": {"enabled": True}}}, {"wall_clock_breakdown": True}],
    ids=["default", "throughput timer", "wall clock"],
)
def test_what_deepspeed_does_around_a_pass_is_done_once_and_not_captured(
    graphs: list[StandIn], lone_world, monkeypatch, section
):
    """Its timers wait for the GPU, which no capture permits."""
    accelerator = import_deepspeed().accelerator.get_accelerator()
    monkeypatch.setattr(accelerator, "synchronize", torch.cuda.synchronize)  # as on a GPU
    engine, called = engine_of(config(graph=True, deepspeed=section), lone_world), []
    engine.model.module.register_forward_pre_hook(lambda *_: called.append("before"))
    engine.model.module.register_forward_hook(lambda *_: called.append("after"))
    train(engine, WARM_UP + 2)
    engine.close()
    assert [graph.replays for graph in graphs] == [2, 2]
    assert called == ["before", "after"] * (WARM_UP + 2)


OBJECTIVES: dict[str, dict[str, Any]] = {
    "classify": {"augment": {"mixup": 0.8}, "tokens": {"patch_drop": 0.5}},
    "mae": {"model": {"pool": "gap", "pos_embed": "sincos_2d", "num_classes": 0},
            "mae": {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}},
    "masked_patch": {"model": {"num_classes": 0}, "masked_patch": {}},
    "dino": {"model": {"num_classes": 0}, "ema": {"decay": 0.9},
             "dino": {"prototypes": 16, "projection_width": 16, "bottleneck": 8, "local_size": 4, "local_views": 2}},
}  # fmt: skip


class Itself:
    """A teacher that is the student: its passes are without gradients, and must not be captured."""

    applied = staticmethod(nullcontext)
    add_up = staticmethod(lambda values: values)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_as_without(graphs: list[StandIn], lone_world, name):
    losses = {}
    for graph in (False, True):
        settings = config(graph=graph, train={"objective": name}, **OBJECTIVES[name])
        engine, objective = engine_of(settings, lone_world), build_objective(settings, CPU)
        if isinstance(objective, Phased):
            objective.enter_phase(Phase(0, 8, 0.5))
        if isinstance(objective, Taught):
            objective.learn_from(Itself())
        losses[graph] = []
        for step in range(WARM_UP + 2):
            torch.manual_seed(step)
            drawn = torch.Generator().manual_seed(step)
            shape = (8, 2 * (8 * 8 + 4 * 4) * 3) if name == "dino" else (8, 8, 8, 3)
            images = torch.randint(0, 256, shape, generator=drawn, dtype=torch.uint8)
            labels = torch.randint(0, 10, (8,), generator=drawn)
            keys, seeds = [str(number) for number in range(8)], np.arange(8, dtype=np.uint64) + 8 * step
            loss = objective.losses(engine.model, Batch(images, labels, torch.ones(8), keys, seeds)).mean()
            engine.backward(loss)
            engine.step()
            if isinstance(objective, Taught):
                objective.step_done(engine.model)
            losses[graph].append(loss.item())
        engine.close()
    assert losses[True] == losses[False]
    assert [graph.replays for graph in graphs] == [2, 2]


@pytest.fixture
def model() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    capture_passes(model)
    return model


def passes(model: nn.Module, count: int = 1, size: int = 2) -> Tensor:
    """The gradient of the first weight, of several passes added up."""
    model.zero_grad()
    for _ in range(count):
        model(torch.ones(size, 3)).square().sum().backward()
    return model[0].weight.grad


def test_shapes_beyond_the_first_ones_run_eagerly_until_one_is_no_longer_used(graphs: list[StandIn], model):
    for size in range(1, MOST + 2):
        passes(model, WARM_UP + 2, size)
    assert len(graphs) == 2 * MOST and {graph.replays for graph in graphs} == {2}
    passes(model, UNUSED, size=MOST + 1)  # meanwhile the others are not
    assert len(graphs) == 2 * MOST + 2
    passes(model, 1, size=1)
    assert len(graphs) == 2 * MOST + 2  # it begins anew


def test_a_pass_before_the_backward_pass_of_the_last_runs_eagerly(graphs: list[StandIn], model):
    passes(model, WARM_UP + 1)
    first, second = torch.randn(2, 3), torch.randn(2, 3)
    found = {}
    for captured in (True, False):
        run = model if captured else model.forward._forward
        torch.manual_seed(0)
        model.zero_grad()
        (run(first).square().sum() - run(second).square().sum()).backward()
        found[captured] = model[0].weight.grad.clone()
    assert torch.equal(found[True], found[False])
    assert [graph.replays for graph in graphs] == [2, 2]


def test_a_pass_whose_loss_is_dropped_is_forgotten(graphs: list[StandIn], model):
    passes(model, WARM_UP + 1)
    model(torch.ones(2, 3))
    passes(model)
    assert [graph.replays for graph in graphs] == [3, 2]


def test_a_pass_has_one_backward_pass(graphs: list[StandIn], model):
    passes(model, WARM_UP)
    loss = model(torch.ones(2, 3)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="has one backward pass"):
        loss.backward()


def test_evaluation_and_passes_without_gradients_are_not_captured(graphs: list[StandIn], model):
    for _ in range(WARM_UP + 2):
        with torch.no_grad():
            model(torch.ones(2, 3))
    model.eval()
    passes(model, WARM_UP + 2)
    assert graphs == []


def test_weights_that_move_are_captured_anew(graphs: list[StandIn], model):
    passes(model, WARM_UP + 1)
    model[0].weight.data = torch.zeros(4, 3)
    model[0].bias.data = torch.zeros(4)
    assert torch.equal(model(torch.ones(2, 3)), model[2].bias.expand(2, 2)) and len(graphs) == 2
    passes(model, WARM_UP)
    assert len(graphs) == 4
    with torch.no_grad():
        model[2].bias.copy_(torch.ones(2))  # an update, in place
    assert torch.equal(model(torch.ones(2, 3)), torch.ones(2, 2)) and len(graphs) == 4


def test_layers_that_leave_fp8_are_captured_anew_and_overflows_are_counted(graphs: list[StandIn]):
    how = {"precision": "fp8", "fp8": {"emulate": True}}
    settings = config(graph=True, train=how)
    vit = build_for_training(settings).to(torch.bfloat16).train()
    nn.init.normal_(vit.head.weight, std=0.02)
    in_fp8 = prepare_model(vit, settings, CPU)
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)

    def step() -> Tensor:
        vit(images).sum().backward()
        return in_fp8.take_overflows()

    for _ in range(WARM_UP + 1):
        step()
    in_fp8.leave(["blocks.0.fc1"])
    for _ in range(WARM_UP + 1):
        assert not step().any()
    assert len(graphs) == 4
    with torch.no_grad():
        vit.blocks[1].mlp.fc2.weight.fill_(float("inf"))
    assert step().view(2, 4)[1].any() and graphs[-1].replays == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((torch.ones(2, 3, requires_grad=True),), "gives the model a tensor that needs a gradient"),
        ((np.ones((2, 3)),), "gives the model a ndarray, and captured passes take"),
    ],
)
def test_what_cannot_be_copied_in_is_refused(graphs: list[StandIn], model, given, said):
    with pytest.raises(UserError, match=f"{said}.*: set train.cuda_graph=false"):
        model(*given)


def test_a_model_that_reads_a_value_is_refused(graphs: list[StandIn]):
    class Reads(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * x.max().item()

    reads = Reads(3, 2)
    capture_passes(reads)
    for _ in range(WARM_UP):
        reads(torch.ones(2, 3))
    with pytest.raises(UserError, match=r"Reads cannot be captured \(operation not permitted .*set train.cuda_graph"):
        reads(torch.ones(2, 3))
