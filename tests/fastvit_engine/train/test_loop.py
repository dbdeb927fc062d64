"""A whole run, and one that resumes, against the same training written out in plain PyTorch."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastvit_engine.config import Config
from fastvit_engine.data import prepare_data
from fastvit_engine.distributed.world import World
from fastvit_engine.models import build_vit
from fastvit_engine.objectives import build_objective
from fastvit_engine.observe.metrics import read_metrics
from fastvit_engine.train.loop import _show_phase

STEPS, WARMUP, RATE, CLIP, DECAY = 6, 2, 0.003, 0.5, 0.5
SETTINGS = [
    f"train.duration={STEPS} steps",
    "train.precision=fp32",
    f"train.grad_clip={CLIP}",
    "schedule.kind=cosine",
    f"schedule.warmup={WARMUP} steps",
    "schedule.final_learning_rate=0",
    f"optimizer.learning_rate={RATE}",
    "optimizer.betas=[0.8, 0.95]",
    "optimizer.eps=1e-3",
    "optimizer.weight_decay=0.2",
    f"ema.decay={DECAY}",
    "checkpoint.every=2 steps",
    "augment.randaugment_ops=1",
    "augment.mixup=0.3",
    "loss.label_smoothing=0.1",
    "model.dropout=0",
    "model.drop_path=0",
    "seed=3",
]


@pytest.mark.distributed
def test_a_run_is_the_training_that_its_configuration_describes(train, tmp_path):
    run = train(tmp_path / "run", *SETTINGS)
    config = Config.model_validate(yaml.safe_load((run / "config.yaml").read_text()))
    torch.manual_seed(3)
    model = build_vit(config.model, mean=config.data.mean, std=config.data.std).train()
    parameters = dict(model.named_parameters())
    matrices = [p for name, p in parameters.items() if name.endswith(".weight") and p.ndim > 1]
    others = [p for p in parameters.values() if all(p is not matrix for matrix in matrices)]
    groups = [{"params": matrices, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-3)
    average = {name: p.detach().clone() for name, p in parameters.items()}
    batches = prepare_data(config, world_size=1, index_folder=tmp_path).train_batches(
        config, rank=0, world_size=1, micro_batch_size=32, consumed=0, pin_memory=False
    )
    objective = build_objective(config, torch.device("cpu"))

    expected = []
    for step in range(STEPS):
        falling = (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2
        rate = RATE * ((step + 1) / WARMUP if step < WARMUP else falling)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss = objective.losses(model, next(batches)).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        kept = min(DECAY, (1 + step) / (10 + step))
        for name, p in parameters.items():
            average[name] = kept * average[name] + (1 - kept) * p.detach()
        expected.append((step + 1, loss.item(), norm.item(), rate))

    assert max(norm for _, _, norm, _ in expected) > CLIP
    assert_trained(run, expected, parameters, average)
    shutil.rmtree(run / "checkpoints" / "step-00000006")  # as if it had been killed before that
    (run / "checkpoints" / "latest").write_text("step-00000004")
    for file in ("model.safetensors", "model_ema.safetensors"):
        (run / file).unlink()
    train(run, *SETTINGS, resume="auto")
    assert_trained(run, expected, parameters, average)


def assert_trained(run, expected, parameters, average):
    """Each step with its loss, gradient norm and learning rate, and the weights at the end with their average."""
    rows, _ = read_metrics(run / "metrics.jsonl")
    for row, values in zip(rows, expected, strict=True):
        assert (row["step"], row["loss"], row["grad_norm"], row["lr"]) == pytest.approx(values, rel=1e-4)
    for file, weights in (("model.safetensors", parameters), ("model_ema.safetensors", average)):
        written = load_file(run / file)
        assert written.keys() == weights.keys()
        for name, values in written.items():
            torch.testing.assert_close(values, weights[name].detach(), rtol=0, atol=1e-6, msg=f"{name} of {file}")


@pytest.mark.parametrize(
    ("device", "shown"), [("cuda", "first forward pass, which compiles kernels"), ("cpu", "first forward pass")]
)
def test_only_on_a_gpu_the_first_passes_are_said_to_compile_kernels(device, shown):
    phases = []
    world = World(rank=0, size=1, device=torch.device(device))
    for name in ("forward", "optimizer step", "reading"):
        _show_phase(SimpleNamespace(phase=phases.append), world, name)
    assert phases == [shown, "first optimizer step", "reading"]
