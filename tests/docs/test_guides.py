"""The walk-throughs of docs/guides work as they stand, from top to bottom, on small data."""

import csv
import json
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvit_engine import load_config, load_model
from tests.docs.conftest import CLASSES
from tests.in_full import only_in_full
from tests.kernels.integrations.conftest import TORCHVISION  # lets timm and transformers be imported

assert TORCHVISION is None or TORCHVISION.ns == "torchvision"
pytestmark = [pytest.mark.slow, pytest.mark.distributed]
GUIDES = Path(__file__).parents[2] / "docs" / "guides"


def loaded(printed: str, after: str) -> torch.nn.Module:
    """What the lines of Python make that a command has printed."""
    scope: dict[str, torch.nn.Module] = {}
    exec(textwrap.dedent(printed.partition(f"{after}\n")[2]), scope)
    return scope["model"].eval()


def test_fine_tune_your_photos(reader, photos, official):
    pytest.importorskip("timm", reason="timm is not installed")
    official("ViT-S_16.npz")
    reader.follow(GUIDES / "photos.md")
    here = reader.folder
    with open(here / "eval-photos" / "per_class.csv", newline="") as file:
        assert [row["class"] + row["name"] for row in csv.DictReader(file)] == [
            f"{number}{name}" for number, name in enumerate(CLASSES)
        ]
    for picture in ("photos.png", "augmented.png", "sheet.png", "eval-photos/confusion.png"):
        with Image.open(here / picture) as image:
            assert image.format == "PNG" and min(image.size) > 200
    assert "<svg" in (here / "runs" / "photos" / "report.html").read_text()
    images = torch.randint(0, 256, (2, 112, 112, 3), dtype=torch.uint8)
    model = reader.scope["model"]
    normalised = ((images / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)
    exported = loaded(reader.printed["export runs/photos --out photos.safetensors"], "in timm:")
    with torch.no_grad():
        expected = model(images)
        for other in (exported, reader.scope["in_timm"].eval(), reader.scope["in_transformers"].eval()):
            logits = other(normalised)
            torch.testing.assert_close(getattr(logits, "logits", logits), expected, rtol=0, atol=1e-5)


def test_from_the_official_weights(reader, photos, imagenet, official):
    pytest.importorskip("timm", reason="timm is not installed")
    official("ViT-B_16-224.npz"), official("ViT-B_16.npz", tanh=True)
    reader.follow(GUIDES / "official-weights.md")
    here = reader.folder
    images = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    in_timm = loaded(reader.printed["convert ViT-B_16-224.npz b16.safetensors --to timm"], "to load it:")
    in_transformers = loaded(reader.printed["convert ViT-B_16-224.npz b16_hf --to hf"], "to load it:")
    in_folder = loaded(reader.printed["convert ViT-B_16-224.npz b16_page --to hub-folder"], "to load it:")
    with torch.no_grad():
        expected = load_model("ViT-B_16-224.npz")(images)
        for other in (in_timm, in_transformers, in_folder):
            logits = other(((images / 255 - 0.5) / 0.5).permute(0, 3, 1, 2))
            torch.testing.assert_close(getattr(logits, "logits", logits), expected, rtol=0, atol=1e-5)
    assert load_model("b16_384.npz").config.image_size == 384
    assert load_model("b16_21k.safetensors").config.num_classes == 0
    assert np.load(here / "train.npz")["features"].shape == (16, 48)
    tuned = load_config(str(here / "runs" / "b16_384" / "config.yaml")).config.model
    assert (tuned.image_size, tuned.activation, tuned.head, tuned.num_classes) == (384, "gelu_tanh", "linear", 4)
    assert load_model("photos_hf").class_names == CLASSES


@only_in_full
def test_self_training(reader, imagenet, official):
    official("ViT-L_16.npz", classes=4)
    reader.smaller = [*reader.smaller, "model.width=48", "model.depth=2", "model.heads=3", "model.num_classes=10"]
    reader.follow(GUIDES / "self-training.md")
    student = load_config(str(reader.folder / "runs" / "student" / "config.yaml")).config
    assert [source.shards for source in student.data.sources] == ["data/digits/train-000000.tar", "data/labelled"]
    assert student.data.soft_labels and "(10, " in reader.spoken


@only_in_full
def test_studies(reader):
    page = GUIDES / "studies.md"
    text = page.read_text()
    (reader.folder / "rates.yaml").write_text(text.partition("```yaml\n")[2].partition("```")[0])
    reader.follow(page, section="## Run it")
    found = json.loads((reader.folder / "studies" / "rates" / "study.json").read_text())
    assert [run["settings"]["model.pool"] for run in found["runs"]] == ["cls", "cls", "gap", "gap"]
    assert all(run["top1"] > 0.5 and run["fewshot5"] > 0.4 for run in found["runs"])
    with Image.open(reader.folder / "studies" / "rates" / "rates.png") as image:
        assert image.width > 800


@only_in_full
def test_compare_with_the_paper(reader, imagenet, pets, vtab, official):
    official("ViT-B_16-224.npz")
    (reader.folder / "data" / "i21k").symlink_to(imagenet)
    (reader.folder / "real.json").write_text(json.dumps([[0, 1], [], [2], [3], [1], [0, 3], [2], [1]]))
    reader.smaller = [*reader.smaller, "model.width=48", "model.depth=2", "model.heads=3"]
    reader.follow(GUIDES / "paper.md")
    runs = reader.folder / "runs"
    settings = {run.name: load_config(str(run / "config.yaml")).config for run in runs.iterdir()}
    assert {name: config.optimizer.learning_rate for name, config in settings.items() if "0.0" in name}.items() >= {
        ("pets-0.003", 0.003),
        ("pets-0.01", 0.01),
    }
    assert [settings[f"pets-seed{seed}"].seed for seed in (0, 1, 2)] == [0, 1, 2]
    tuned = [config for name, config in settings.items() if name != "b16"]
    assert {(config.model.image_size, config.optimizer.kind) for config in tuned} == {(384, "sgd")}
    found = json.loads(reader.printed["evaluate runs/vtab-dtd --data data/dtd --json"].splitlines()[0])
    assert found["samples"] == 4
