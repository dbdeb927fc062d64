"""Snippets of other pages, run as they are written."""

import json
import re
import shlex
from pathlib import Path

import pytest

from fastvit_engine.cli import main
from fastvit_engine.config import load_config
from fastvit_engine.data.build.make import make_dataset
from fastvit_engine.observe.metrics import read_metrics
from fastvit_engine.recipe_files import recipe_paths
from fastvit_engine.train.schedule import Schedule
from tests.docs.conftest import SHORT

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def shards(tmp_path, photos):
    """data/photos: four classes, 12 images for training and 8 for evaluation."""
    make_dataset(str(photos), tmp_path / "data" / "photos", eval_fraction=0.4, workers=1, progress=lambda text: None)
    return tmp_path / "data" / "photos"


@pytest.mark.parametrize("page", ["launch.md", "guides/imagenet21k.md"])
def test_the_trial_before_a_large_run_suits_every_recipe_of_one(page):
    (trial,) = re.findall(r'`((?:--set \S+?="[^"]+" |--set \S+ )+--set data\.eval=null)`', (DOCS / page).read_text())
    settings = dict(word.split("=", 1) for word in shlex.split(trial) if word != "--set")
    assert settings["train.duration"] == "20 steps"
    settings |= {"data.train": "shards", "data.eval": None}  # null
    sources = ("paper", "big_vision", "self_supervised")
    recipes = [name for name, path in recipe_paths().items() if path.parent.name in sources]
    for recipe in recipes:
        cooldown = {"schedule.cooldown": "5 steps"} if recipe == "vit_g14_jft3b" else {}  # as launch.md says of rsqrt
        schedule = Schedule(load_config(recipe, settings | cooldown).config, 1_000_000)
        assert (schedule.total_steps, schedule.evaluate_every) == (20, 0), recipe


@pytest.mark.slow
def test_fine_tuning_from_python(reader, shards, official):
    official("ViT-S_16.npz")
    classes = '"model.num_classes": 12'
    reader.instead = {classes: f"{classes}, **{dict(setting.split('=') for setting in SHORT)}"}
    reader.follow(DOCS / "finetune.md", section="## From Python")
    rows = read_metrics(reader.folder / "runs" / "birds" / "metrics.jsonl")[0]
    assert [row["step"] for row in rows] == [1, 2, 3]
    model = reader.scope["model"]
    assert (model.config.num_classes, model.config.image_size) == (12, 224)
    again = "fastvit train probe --init runs/birds --set data.train=data/photos --set data.eval=data/photos \\\n"
    again += "    --set model.num_classes=4 --set data.eval_crop=0.9 --out runs/again"
    says = "evaluating with data.eval_crop=0.9, data.eval_transform=timm, as the recipe says; "
    says += "... itself is evaluated with data.eval_crop=0.875, data.eval_transform=timm"
    (reader.folder / "page.md").write_text(f"```bash\n{again}\n```\n```\n{says}\n```\n")
    reader.instead = {}
    reader.follow(reader.folder / "page.md")


def test_few_shot_accuracy_from_saved_features(reader, shards, official, capsys):
    """The figures of the command follow from the file that it writes, to the bit."""
    assert main(["convert", str(official("b16.npz")), "b16", "--to", "hub-folder"]) == 0
    (reader.folder / "runs").mkdir()
    (reader.folder / "b16").rename(reader.folder / "runs" / "b16")
    for section in ("## Features", "## Few-shot accuracy"):
        reader.follow(DOCS / "evaluate.md", section=section)
    (command,) = [words for words in reader.ran if "--json" in words]
    figures = json.loads(reader.printed[" ".join(command)].splitlines()[0])
    assert list(figures["shots"]) == ["5"]
    assert reader.spoken == f"{figures['shots']['5']['seeds'][0]}\n"
