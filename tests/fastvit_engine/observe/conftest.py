"""A run folder as the trainer leaves it, small enough to read."""

import base64
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvit_engine.observe.metrics import EvalRow, FewShotRow, LossRow, OwnRow, TrainRow
from fastvit_engine.observe.run_folder import RunFolder

ENVIRONMENT = {
    "versions": {"fastvit_engine": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "triton": None},
    "hostname": "node-1",
    "cpu_count": 8,
    "gpu": None,
    "command": "fastvit train quickstart",
    "started": "2026-05-01T10:00:00+02:00",
    "model": "Ti/4",
    "parameters": 412_000,
    "training_flops_per_image": 4.3e7,
    "peak_flops": 2.1e11,
    "peak_flops_source": "measured",
    "world_size": 2,
    "zero_stage": 1,
    "precision": "fp32",
    "device": "cpu",
    "total_steps": 840,
    "global_batch_size": 64,
    "samples_per_epoch": 1437,
    "shards": "data/digits/train-{000000..000003}.tar",
}


def train_row(step: int, **values: Any) -> TrainRow:
    row: dict[str, Any] = {
        "step": step,
        "epoch": step * 64 / 1437,
        "samples": step * 64,
        "loss": 2.0 / step,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "images_per_second": 750.0,
        "mfu": 0.155,
        "data_wait": 0.01,
        "memory_bytes": 300 * 2**20,
        "samples_hash": "ab12",
        "seconds": step * 72 / 840,
    }
    return row | values


def own_row(step: int, name: str = "mine", **figures: float) -> OwnRow:
    return {"step": step, "eval": name, "figures": figures, "seconds": 0.5}


def few_shot_row(step: int, *means: float, **values: Any) -> FewShotRow:
    """One whose means are those of 1, 5, 10 and 25 shots, as far as they are given."""
    shots = {str(n): {"mean": m, "std": 0.01, "seeds": [m]} for n, m in zip((1, 5, 10, 25), means, strict=False)}
    return {"step": step, "eval": "fewshot", "shots": shots, "l2": 1024.0, "samples": 360, "seconds": 2.0} | values


def eval_row(step: int, top1: float, **values: Any) -> EvalRow:
    row = {"step": step, "eval": "eval", "top1": top1, "top5": 0.99, "loss": 0.1, "samples": 360, "seconds": 0.4}
    return row | values


def loss_row(step: int, loss: float, **values: Any) -> LossRow:
    return {"step": step, "eval": "eval", "loss": loss, "samples": 360, "seconds": 0.4} | values


def png_url(width: int, height: int = 1) -> str:
    """A black greyscale PNG as a data URL."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * (width + 1) * height)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(png).decode()


MakeRun = Callable[..., RunFolder]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(
        rows: list[Any], samples: dict[str, Any] | None = None, config: str | None = "seed: 0\n", **environment: Any
    ) -> RunFolder:
        run = RunFolder(tmp_path / "quickstart")
        run.path.mkdir()
        run.environment.write_text(json.dumps(ENVIRONMENT | environment))
        run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if samples is not None:
            run.samples.write_text(json.dumps(samples))
        if config is not None:
            run.config.write_text(config)
        return run

    return make
