"""Training with captured passes is training with eager ones, on a GPU.

`tests/fastvit_engine/models/test_cuda_graph.py` has what can be tested without one.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fastvit_engine.config import Config
from fastvit_engine.data.stream.batch_split import BatchSplit
from fastvit_engine.distributed.world import World, join_world
from fastvit_engine.engine.build import build_engine
from fastvit_engine.engine.deepspeed import forget_process_groups
from fastvit_engine.models import build_for_training
from fastvit_engine.models.cuda_graph import CapturedForward
from fastvit_engine.train.prepared_model import prepare_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

MODEL = {"name": "Ti/16", "image_size": 64, "depth": 4, "num_classes": 10, "drop_path": 0.2}
STEPS, SIZES = 20, (16, 16, 12)  # micro-batches of a step, the last of another size


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    pytest.importorskip("deepspeed")
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with join_world() as world:
        yield world
    forget_process_groups()


def train(world: World, stage: int, precision: str, *, graph: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of all passes, and the weights after them."""
    how = {"global_batch_size": sum(SIZES), "precision": precision, "cuda_graph": graph, "recompute": "none"}
    config = Config.model_validate({"model": MODEL, "train": how, "zero": {"stage": stage}})
    torch.manual_seed(0)
    model = build_for_training(config)
    nn.init.normal_(model.head.weight, std=0.02)
    prepare_model(model, config, world.device)
    engine = build_engine(model, config, BatchSplit(sum(SIZES), 1, len(SIZES)), world)
    engine.model.train()
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)
        for number, size in enumerate(SIZES):
            drawn = torch.Generator().manual_seed(100 * step + number)
            images = torch.randint(0, 256, (size, 64, 64, 3), generator=drawn, dtype=torch.uint8).to(world.device)
            labels = torch.randint(0, 10, (size,), generator=drawn).to(world.device)
            loss = nn.functional.cross_entropy(engine.model(images).float(), labels)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    if graph:
        assert isinstance(model.forward, CapturedForward) and len(model.forward.captured) == len(set(SIZES))
    weights = {f"{part.name}/{part.start}": part.values.clone() for part in engine.master_weights()}
    engine.close()
    return losses, weights


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_losses_and_weights_are_those_of_eager_passes(world, stage, precision):
    (losses, weights), (expected, eager) = (train(world, stage, precision, graph=graph) for graph in (True, False))
    tolerance = 1e-2 if precision == "bf16" else 1e-4
    assert losses == pytest.approx(expected, rel=tolerance)
    for name, values in eager.items():  # 20 updates of at most a learning rate each
        torch.testing.assert_close(weights[name], values, rtol=tolerance, atol=tolerance * 20 * 1e-3, msg=name)
