"""Pretrain a ViT from scratch on a folder of images, one sub-folder per class.

    python examples/pretrain_folder.py photos/

Without a folder it trains on scikit-learn's handwritten digits: half a minute on a CPU. STEPS=20 shows that it works.
"""

# %% [markdown]
# # From a folder to a model
# Shards first. The same call does nothing more if they are complete, and finishes them if it was interrupted.

# %%
import os
import sys
from pathlib import Path

import fastvit_engine as fastvit
from fastvit_engine.data.build.make import make_dataset

OUT = Path(os.environ.get("OUT", "runs/pretrain_folder"))
photos = sys.argv[1] if len(sys.argv) > 1 else None
recipe = "photos" if photos else "quickstart"
info = make_dataset(photos or "digits", OUT / "shards", eval_fraction=0.2, samples_per_shard=200).info
assert info is not None  # it is None while other machines still write parts

# %% [markdown]
# ## Train
# A recipe is a file of settings; every one of them can be changed here. Run the script again to resume.

# %%
config = fastvit.load_config(
    recipe,
    {
        "data.train": str(OUT / "shards"),
        "data.eval": str(OUT / "shards"),
        "model.num_classes": len(info.classes),
        "train.duration": f"{os.environ.get('STEPS', '600')} steps",
    },
)
fastvit.train(config, OUT / "run", resume=True)

# %% [markdown]
# ## Measure it
# The run folder holds the weights, the metrics of each logged step, and the configuration that repeats the run.

# %%
model = fastvit.load_model(OUT / "run")
accuracy = fastvit.evaluate(model, OUT / "shards")
print(f"top-1 {accuracy.top1:.1%} on {accuracy.samples} held-out images")
