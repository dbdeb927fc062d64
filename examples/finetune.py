"""Fine-tune pretrained weights on images of your own.

    MODEL=ViT-S_16.npz python examples/finetune.py photos/

MODEL is an official .npz file, weights of timm or transformers, or a run folder. Without it and without photos, the
script continues from examples/pretrain_folder.py: run that first. STEPS=10 shows that it works.
"""

# %% [markdown]
# # Fine-tune
# Width, patch size, activation, mean and std come from the weights. The image size is yours: larger is often better.

# %%
import os
import sys
from pathlib import Path

import fastvit_engine as fastvit
from fastvit_engine.data.build.make import make_dataset

OUT = Path(os.environ.get("OUT", "runs/finetune"))
model_file = os.environ.get("MODEL", "runs/pretrain_folder/run")
photos = sys.argv[1] if len(sys.argv) > 1 else "digits"
info = make_dataset(photos, OUT / "shards", eval_fraction=0.2, samples_per_shard=200).info
assert info is not None  # it is None while other machines still write parts

# %% [markdown]
# ## Train
# The head is new, with zeros for weights: `init.head=keep` would keep the old one for the same classes.

# %%
config = fastvit.load_config(
    "finetune_photos",
    {
        "init.from": model_file,
        "data.train": str(OUT / "shards"),
        "data.eval": str(OUT / "shards"),
        "model.image_size": fastvit.load_model(model_file).config.image_size,
        "model.num_classes": len(info.classes),
        "train.duration": f"{os.environ.get('STEPS', '200')} steps",
        "train.global_batch_size": 64,
        "schedule.warmup": "10%",
    },
)
fastvit.train(config, OUT / "run", resume=True)

# %% [markdown]
# ## Compare
# The model before fine-tuning has another head, so its features are compared: see few_shot.py.

# %%
accuracy = fastvit.evaluate(fastvit.load_model(OUT / "run"), OUT / "shards")
print(f"top-1 {accuracy.top1:.1%} on {accuracy.samples} held-out images")
