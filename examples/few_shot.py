"""How good are a model's features? Fit a linear classifier to a few images per class, in closed form.

    MODEL=ViT-S_16.npz python examples/few_shot.py

Without MODEL, the features are those of a ViT with random weights: what pretraining has to beat.
"""

# %% [markdown]
# # Few-shot accuracy
# Images and labels: here scikit-learn's handwritten digits, as bytes.

# %%
import os

import numpy as np
import torch
from sklearn.datasets import load_digits

import fastvit_engine as fastvit
from fastvit_engine.evaluate.fewshot import few_shot_accuracy

torch.manual_seed(0)
model_file = os.environ.get("MODEL")
model = (
    fastvit.load_model(model_file) if model_file else fastvit.build_model(fastvit.load_config("quickstart"))
).eval()
digits = load_digits()
size = model.config.image_size
scans = torch.from_numpy(digits.images)[:, None].expand(-1, 3, -1, -1) * 15.9
images = torch.nn.functional.interpolate(scans, size=size, mode="bilinear").byte().permute(0, 2, 3, 1)
images, labels = images[:1000], digits.target[:1000]  # uint8 [1000, S, S, RGB], [1000]

# %% [markdown]
# ## Features
# `represent` gives what the head sees, one row per image. The model takes bytes and normalises them itself.

# %%
with torch.no_grad():
    features = np.concatenate([model.represent(batch).numpy() for batch in images.split(100)])

# %% [markdown]
# ## A classifier for each number of shots
# No training: regularised least squares on the chosen images, as in the ViT paper. Three choices of images each.

# %%
half = len(features) // 2
for shots in (1, 5, 10):
    accuracies = [
        few_shot_accuracy(
            features[:half], labels[:half], features[half:], labels[half:], shots=shots, num_classes=10, seed=seed
        )
        for seed in range(3)
    ]
    print(
        f"{shots}-shot accuracy on {len(features) - half} images: {np.mean(accuracies):.1%} ± {np.std(accuracies):.1%}"
    )
