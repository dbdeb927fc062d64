"""The pages that get somebody started work as they stand, from top to bottom."""

import re
from pathlib import Path

import pytest
import torch

from fastvit_engine.cli import main
from tests.docs.conftest import write_photo
from tests.in_full import only_in_full
from tests.kernels.integrations.conftest import TORCHVISION  # lets timm be imported

assert TORCHVISION is None or TORCHVISION.ns == "torchvision"
pytestmark = [pytest.mark.slow, pytest.mark.distributed]
DOCS = Path(__file__).parents[2] / "docs"


def test_layers(reader):
    pytest.importorskip("timm", reason="timm is not installed")
    reader.follow(DOCS / "start" / "layers.md")
    assert float(reader.spoken.partition("largest difference: ")[2].split()[0]) < 1e-4
    reader.scope["x"] = torch.randn(1, 5, 768)
    for section in ("## In a model of timm, transformers or open_clip", "## In a model of your own"):
        reader.follow(DOCS / "kernels.md", section=section)
    assert reader.scope["y"].shape == (1, 5, 768)


@only_in_full
def test_pretrain(reader):
    """Trains as long as the page says: it is short."""
    reader.smaller = ["data.num_workers=0"]
    for section in ("## 2. Make shards", "## 3. Train", "## 4. Continue on another number of processes"):
        reader.follow(DOCS / "start" / "pretrain.md", section=section)
    reader.follow(DOCS / "start" / "pretrain.md", section="## 5. Plan the large run")
    assert (reader.folder / "runs" / "first" / "report.html").is_file()


@only_in_full
def test_benchmark(reader):
    for section in (
        "## 2. What can be measured?",
        "## 3. Does everything run, and is it right?",
        "## 5. A kernel of your own",
    ):
        reader.follow(DOCS / "start" / "benchmark.md", section=section)


@only_in_full
def test_imagenet_21k(reader):
    """On class folders, which the tar holds as tars; the job itself is shown, not started."""
    for number in range(30):
        write_photo(reader.folder / "classes" / f"n{number % 3:08}" / f"{number}.jpg", number, number % 3)
    reader.follow(DOCS / "guides" / "imagenet21k.md", section="## 2. Try it on a part")
    assert (reader.folder / "try.png").is_file()


@only_in_full
def test_from_python(reader):
    assert (
        main(["data", "make", "digits", "--out", "data/digits", "--eval-fraction", "0.2", "--samples-per-shard", "200"])
        == 0
    )
    digits = '"data.eval": "data/digits"'
    reader.instead = {f"{digits}}}": f'{digits}, "train.duration": "20 steps"}}'}
    reader.follow(DOCS / "python.md", section="# From Python")
    samples = '"data.train_samples": 1438'
    reader.instead = {f"{{{samples}}}": f'{{{samples}, "train.duration": "20 steps", "data.eval": "data/digits"}}'}
    reader.follow(DOCS / "python.md", section="### On data of your own")
    reader.instead = {"--out runs/focal": '--set train.duration="20 steps" --out runs/focal'}
    (block,) = re.findall(
        r"^```python\n(from torch\.nn\.functional .*?)^```$", (DOCS / "python.md").read_text(), re.M | re.S
    )
    Path("focal.py").write_text(block)
    reader.follow(DOCS / "python.md", section="### With an objective of your own")
    assert "objective: focal:Focal" in Path("runs/focal/config.yaml").read_text()
    every = '"evaluate.every": "100 steps"'
    reader.instead = {f"{every}}}": f'{every}, "train.duration": "20 steps"}}'}
    reader.follow(DOCS / "python.md", section="### With evaluators of your own")
    assert '"eval": "head", "figures": {"largest": ' in Path("runs/measured/metrics.jsonl").read_text()
    reader.instead = {}
    reader.follow(DOCS / "python.md", section="## Use a model")
    assert reader.scope["logits"].shape == (2, 10)
