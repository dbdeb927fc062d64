"""Train a timm model in a loop of your own, its blocks run by the fused kernels.

    python examples/timm_train.py

One line is new: `accelerate(model)`. In timm's own train.py it goes straight after `model = create_model(...)`, before
everything that wraps or copies the model: `--torchcompile`, `--model-ema`, distributed training. Takes a minute on a
CPU; EPOCHS=3 shows that it works. Needs timm and scikit-learn.
"""

# %%
import os
from typing import Any

import timm
import torch
from sklearn.datasets import load_digits
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

from fastvit_kernels import accelerate

EPOCHS, BATCH = int(os.environ.get("EPOCHS", "20")), 64
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)
digits, first = load_digits(), 1400  # handwritten; the last 397 are for evaluation
scans = torch.from_numpy(digits.images).float().div(8).sub(1)[:, None].expand(-1, 3, -1, -1)
images = torch.nn.functional.interpolate(scans, size=16, mode="bilinear").to(device)  # [1797, 3, 16, 16]
labels = torch.from_numpy(digits.target).to(device)

# %%
SHAPE: Any = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10}
model = timm.create_model("vit_tiny_patch16_224", **SHAPE, drop_path_rate=0.02).to(device)
print(accelerate(model))  # in place; the table says what each module runs now
optimizer, criterion = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05), SoftTargetCrossEntropy()
mixup, average = Mixup(mixup_alpha=0.1, num_classes=10), ModelEmaV3(model, decay=0.95)  # a copy, fused as well

# %%
for epoch in range(EPOCHS):
    total = 0.0
    for batch in torch.randperm(first)[: first // BATCH * BATCH].view(-1, BATCH).to(device):
        mixed, soft = mixup(images[batch].clone(), labels[batch])
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = criterion(model(mixed), soft)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model)
        total += loss.item()
    print(f"epoch {epoch}: loss {total / (first // BATCH):.3f}")

# %% The weights are timm's: they load into the model as timm makes it, and give the same answers.
plain = timm.create_model("vit_tiny_patch16_224", **SHAPE).to(device)
plain.load_state_dict(average.module.state_dict())
with torch.no_grad():
    expected, found = plain.eval()(images[first:]), average.module.eval()(images[first:])
print(f"top-1 {(found.argmax(dim=1) == labels[first:]).float().mean() * 100:.1f} %")
print(f"largest difference from plain timm: {(expected - found).abs().max().item():.1e}")
