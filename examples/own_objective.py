"""Train with an objective of your own: here a focal loss, which gives easy images less weight.

    python examples/own_objective.py

Takes half a minute on a CPU; STEPS=20 shows that it works. Needs scikit-learn.
"""

# %% [markdown]
# # What an objective is
# It turns a batch into a loss for each sample. The engine takes the mean over the global batch, does the backward pass
# and everything else. A sample of weight 0 is padding or could not be decoded: its loss must be 0.

# %%
import os
from pathlib import Path

import torch
from torch import Tensor, nn

import fastvit_engine as fastvit
from fastvit_engine.config import Config
from fastvit_engine.data import Batch
from fastvit_engine.data.build.make import make_dataset

OUT = Path(os.environ.get("OUT", "runs/own_objective"))


class Focal:
    """Cross-entropy times (1 - probability of the label) squared."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.device = device

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels, weights = (tensor.to(self.device) for tensor in (batch.images, batch.labels, batch.weights))
        losses = nn.functional.cross_entropy(model(images).float(), labels, reduction="none")
        return (1 - (-losses).exp()).square() * losses * weights


# %% [markdown]
# ## Train with it
# The run records `own_objective:Focal`, and refuses to resume with another objective. From the command line, a class in
# a module of its own is named by `--set train.objective=MODULE:Focal`.

# %%
make_dataset("digits", OUT / "shards", eval_fraction=0.2, samples_per_shard=200)
shards = {"data.train": str(OUT / "shards"), "data.eval": str(OUT / "shards")}
config = fastvit.load_config("quickstart", {**shards, "train.duration": f"{os.environ.get('STEPS', '600')} steps"})
fastvit.train(config, OUT / "run", resume=True, objective=Focal)
print(f"top-1 {fastvit.evaluate(fastvit.load_model(OUT / 'run'), OUT / 'shards').top1:.1%}")
