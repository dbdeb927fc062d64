"""Explore a pretrained model: predictions, attention, features, position embedding, and a brief fine-tuning.

Editors that know `# %%` cells, such as VS Code, open this file as a notebook. It is also a script:

    MODEL=ViT-B_16.npz PHOTOS=photos/ python examples/explore_model.py

MODEL is any model that `fastvit_engine.load_model` takes, PHOTOS a folder with a sub-folder of images per class.
Without them, a small ViT is trained on handwritten digits first, which takes seconds and needs scikit-learn.
IMAGE_SIZE=224 spares a CPU the larger images of a model such as DINOv2: the position table is resampled.
"""

# %% [markdown]
# # Explore a pretrained model
# Name a model and photos here, or leave both as they are. Pictures are written to OUT.

# %%
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import fastvit_engine as fastvit
from fastvit_engine.config import load_config
from fastvit_engine.data.build.make import make_dataset
from fastvit_engine.data.check.contact_sheet import Tile, draw_sheet, save_sheet
from fastvit_engine.evaluate.confusion import name_of
from fastvit_engine.evaluate.fewshot import few_shot_accuracy
from fastvit_engine.evaluate.one_pass import config_for
from fastvit_engine.evaluate.predict import prepare_image
from fastvit_engine.models import VisionTransformer

MODEL, PHOTOS = os.environ.get("MODEL", ""), os.environ.get("PHOTOS", "")
IMAGE_SIZE = int(os.environ.get("IMAGE_SIZE", "0")) or None  # None: the model's
OUT = Path(os.environ.get("OUT", "runs/explore"))
MOST_PHOTOS = 200
OUT.mkdir(parents=True, exist_ok=True)


def show(sheet: Image.Image, name: str) -> Image.Image:
    """Writes a picture; at the end of a cell, a notebook shows what is returned."""
    save_sheet(sheet, OUT / name)
    print(OUT / name)
    return sheet


# %% [markdown]
# ## A model and photos, if you have named none

# %%
if not PHOTOS:
    from sklearn.datasets import load_digits

    PHOTOS = str(OUT / "digits")
    digits = load_digits()
    for number, (scan, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = Path(PHOTOS) / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((scan * 15.9).astype(np.uint8)).save(folder / f"{number}.png")

shards = OUT / "shards"
make_dataset(PHOTOS, shards, eval_fraction=0.2, workers=1)  # at once, if it has been done before

if not MODEL:
    MODEL = str(OUT / "pretrained")
    settings = {"data.train": str(shards), "data.eval": str(shards), "train.duration": "200 steps"}
    fastvit.train(load_config("quickstart", settings), MODEL, resume=True)

# %% [markdown]
# ## Load it
# The weights say what the model is, and how images are prepared for it.

# %%
model = fastvit.load_model(MODEL, image_size=IMAGE_SIZE)
assert isinstance(model, VisionTransformer)  # and none of timm's, which has other layers
config = config_for(model, load_config(None))
size, patch = model.config.image_size, model.shape.patch_size
grid, class_tokens = size // patch, int(model.config.pool == "cls")
print(
    f"{model.config.name}: {sum(p.numel() for p in model.parameters()):,} parameters, {size} pixels, {grid}^2 patches"
)

classes = sorted(folder.name for folder in Path(PHOTOS).iterdir() if folder.is_dir())
paths = [(path, label) for label, name in enumerate(classes) for path in sorted((Path(PHOTOS) / name).iterdir())]
paths = [paths[index] for index in np.random.default_rng(0).permutation(len(paths))[:MOST_PHOTOS]]
images = torch.from_numpy(np.stack([prepare_image(path, config) for path, _ in paths]))  # uint8 [N, S, S, 3]
labels = np.array([label for _, label in paths])

# %% [markdown]
# ## What does it say?
# A head of zeros, as the official files for ImageNet-21k have it, says nothing. Without a head, the labels are shown.

# %%
some = images[:8]
captions = [classes[label] for label in labels[:8]]
if model.config.num_classes:
    with torch.no_grad():
        probabilities, outputs = model(some).softmax(dim=1).max(dim=1)
    captions = [
        f"{100 * share:.0f} % {name_of(output, model.class_names)}"
        for share, output in zip(probabilities.tolist(), outputs.tolist(), strict=True)
    ]
tiles = [Tile(image, caption) for image, caption in zip(some.numpy(), captions, strict=True)]
show(draw_sheet([tiles], title="predictions"), "predictions.png")

# %% [markdown]
# ## Where does it look?
# Attention rollout (ViT paper, appendix D.8): the mean over the heads, plus the identity for the residual connection,
# multiplied from layer to layer; of the class token's row, or of the mean of all rows if there is no class token.

# %%
maps = torch.cat([model.attention_maps(image[None]).mean(dim=2) for image in some], dim=1)  # [L, B, N, N]
maps = (maps + torch.eye(maps.shape[-1])) / 2
rollout = maps[0]
for layer in maps[1:]:
    rollout = layer @ rollout
seen = (rollout[:, 0] if class_tokens else rollout.mean(dim=1))[:, class_tokens:].unflatten(1, (grid, grid))
bright = seen.flatten(1).quantile(0.95, dim=1)[:, None, None]  # a few patches may outshine all others
seen = (seen / bright).clamp(0.1, 1)
masks = torch.nn.functional.interpolate(seen[:, None], size=(size, size), mode="bilinear")[:, 0, :, :, None]
tiles = [Tile(image) for image in some.numpy()]
attended = [Tile(image) for image in (some * masks).to(torch.uint8).numpy()]
show(draw_sheet([tiles, attended], title="attention", note="brighter: seen more"), "attention.png")

# %% [markdown]
# ## What does the position embedding know?
# Each small square is one patch: how similar its position embedding is to that of every other (cosine), bright for
# similar, as in figure 7 (centre) of the ViT paper. Rows and columns show if the model has learned the grid.

# %%
if (positions := model.patch_positions()) is None:
    print(f"none is added to its patches: model.pos_embed is {model.config.pos_embed}")
else:
    table = torch.nn.functional.normalize(positions.detach(), dim=1)
    similarity = (table @ table.T).unflatten(0, (grid, grid)).unflatten(2, (grid, grid))  # [grid, grid, grid, grid]
    low, high = similarity.min(), similarity[similarity < 0.999].max()
    squares = torch.nn.functional.pad((similarity - low) / (high - low), (1, 1, 1, 1)).clamp(0, 1)
    picture = squares.permute(0, 2, 1, 3).reshape(grid * (grid + 2), -1)
    scale = max(1, 800 // len(picture))
    pixels = (255 * picture).to(torch.uint8).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    show(Image.fromarray(pixels.numpy()), "position_embedding.png")

# %% [markdown]
# ## How good are its features?
# A linear classifier in closed form, on what the head sees of a few images per class; the rest is for evaluation.

# %%
with torch.no_grad():
    features = np.concatenate([model.represent(batch).numpy() for batch in images.split(32)])
half = len(features) // 2
for shots in (1, 5):
    accuracy = few_shot_accuracy(
        features[:half], labels[:half], features[half:], labels[half:], shots=shots, num_classes=len(classes), seed=0
    )
    print(f"{shots}-shot accuracy on {len(features) - half} images: {accuracy:.1%}")

# %% [markdown]
# ## Fine-tune it, briefly
# On small images and for a few steps, to see it work; docs/guides/photos.md is about doing it well.

# %%
brief = {
    "init.from": MODEL,
    "model.num_classes": len(classes),
    "model.image_size": min(size, 8 * patch),
    "data.train": str(shards),
    "data.eval": str(shards),
    "train.duration": "10 steps",
    "train.global_batch_size": 16,
    "evaluate.every": "100%",
    "checkpoint.every": "100%",
}
fastvit.train(load_config("finetune_photos", brief), OUT / "fine-tuned", resume=True)
tuned = fastvit.load_model(OUT / "fine-tuned")
print(f"top-1 after 10 steps: {fastvit.evaluate(tuned, shards).top1:.1%}")
