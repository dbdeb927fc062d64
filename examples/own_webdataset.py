"""Train on a WebDataset pipeline of your own, in place of the engine's loader.

    python examples/own_webdataset.py

Takes half a minute on a CPU; STEPS=20 shows that it works. Needs scikit-learn.
"""

# %% [markdown]
# # Your shards, your pipeline
# Any shards will do; these are handwritten digits.

# %%
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image

import fastvit_engine as fastvit
from fastvit_engine.data.build.make import make_dataset
from fastvit_engine.data.stream.iterable import Share

OUT = Path(os.environ.get("OUT", "runs/own_webdataset"))
make_dataset("digits", OUT / "shards", eval_fraction=0.2, samples_per_shard=100)


def prepared(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((16, 16)))  # uint8 [model.image_size, model.image_size, RGB]


def pipeline(share: Share) -> Iterator[tuple[np.ndarray, int]]:
    """One pass over this rank's part of the shards. The engine calls it again for each epoch."""
    shards = sorted(str(path) for path in (OUT / "shards").glob("train-*.tar"))[share.rank :: share.world_size]
    dataset = wds.WebDataset(shards, shardshuffle=len(shards), seed=share.consumed, empty_check=False)
    return iter(dataset.shuffle(500).decode("pil").to_tuple("png", "cls").map_tuple(prepared, int))


# %% [markdown]
# ## Train on it
# The length of an epoch must be given, since nobody can count an iterable. The order of samples is the pipeline's: the
# engine's promises about it hold only for its own loader.

# %%
duration = f"{os.environ.get('STEPS', '600')} steps"
settings = {"data.train_samples": 1438, "data.eval": str(OUT / "shards"), "train.duration": duration}
fastvit.train(fastvit.load_config("quickstart", settings), OUT / "run", data=pipeline, resume=True)
print(f"top-1 {fastvit.evaluate(fastvit.load_model(OUT / 'run'), OUT / 'shards').top1:.1%}")
