"""What tests of commands share: a recorded run, and a small model in a file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastvit_engine.cli import main
from fastvit_engine.config import ModelConfig
from fastvit_engine.models import build_vit
from fastvit_engine.models.weights.safetensors_file import model_metadata
from tests.fastvit_engine.observe.conftest import make_run

__all__ = ["make_run"]  # a fixture

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="session")
def write_model(tmp_path_factory):
    """write_model(seed, names=..., **model) -> a file of random weights for images of 8 pixels and ten classes."""

    def write(seed: int = 0, names: list[str] | None = NAMES, **model: object) -> Path:
        given = {"name": "Ti/4", "image_size": 8, "num_classes": 10, "width": 32, "depth": 1, "heads": 2} | model
        config = ModelConfig.model_validate(given)
        torch.manual_seed(seed)
        built = build_vit(config, mean=(0.5,) * 3, std=(0.5,) * 3)
        if config.num_classes:
            torch.nn.init.normal_(built.head.weight, std=0.5)
        pixels = {"mean": [0.5] * 3, "std": [0.5] * 3, "eval_crop": 1.0, "eval_transform": "fast"}
        path = tmp_path_factory.mktemp("model") / f"model-{seed}.safetensors"
        metadata = model_metadata(config.model_dump(mode="json"), pixels, names, "here")
        save_file(dict(built.state_dict()), path, metadata=metadata)
        return path

    return write


@pytest.fixture(scope="session")
def model_file(write_model) -> Path:
    return write_model()


@pytest.fixture
def fastvit(capsys, monkeypatch):
    """fastvit("predict", model, ...) -> (exit code, stdout, stderr), in this process, with stdout as JSON if it is."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(*words: object):
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, json.loads(out) if "--json" in words and code == 0 else out, err

    return run
