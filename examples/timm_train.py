"""Train a timm model with timm's own parts, its blocks run by the fused kernels.

The same two lines go into timm's train.py, straight after its `model = create_model(...)`:

    from fastvit_kernels import accelerate
    print(accelerate(model))

There they come before everything that wraps or copies the model: `--torchcompile`, `--model-ema`, and distributed
training. All of it works as before, as do checkpoints: names and shapes of the parameters do not change.

    python examples/timm_train.py

Takes a minute on a CPU; EPOCHS=3 shows that it works. Needs timm and scikit-learn.
"""

# %% [markdown]
# # Train a timm model
# Handwritten digits, 8x8 pixels, in place of a folder of photos.

# %%
import os
from typing import Any

import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import Mixup, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, NativeScaler, accuracy
from torch.utils.data import Dataset

from fastvit_kernels import accelerate

EPOCHS, BATCH, SIZE = int(os.environ.get("EPOCHS", "20")), 64, 16
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)


class Digits(Dataset):
    """Images of handwritten digits, as PIL, and their classes."""

    def __init__(self, training: bool, transform: object = None) -> None:
        digits, first = load_digits(), 1400  # the last 397 are for evaluation
        part = slice(None, first) if training else slice(first, None)
        self.images, self.labels, self.transform = digits.images[part], digits.target[part], transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[object, int]:
        image = Image.fromarray((self.images[index] * 15.9).astype("uint8")).convert("RGB")
        return self.transform(image) if callable(self.transform) else image, int(self.labels[index])


def loader(training: bool) -> Any:
    dataset: Any = Digits(training)  # `create_loader` sets its transform
    return create_loader(
        dataset,
        input_size=(3, SIZE, SIZE),
        batch_size=BATCH,
        is_training=training,
        hflip=0.0,  # a mirrored digit is another
        color_jitter=0.0,
        scale=(0.8, 1.0),
        ratio=(1.0, 1.0),
        num_workers=0,
        device=device,
        persistent_workers=False,
        pin_memory=device.type == "cuda",
    )


train_loader, eval_loader = loader(training=True), loader(training=False)
mixup = Mixup(mixup_alpha=0.1, num_classes=10)

# %% [markdown]
# ## The model, and the one line that is not in a training script of timm
# The table says what each module runs now.

# %%
model = timm.create_model(
    "vit_tiny_patch16_224", img_size=SIZE, patch_size=4, embed_dim=64, depth=2, num_heads=2, num_classes=10,
    drop_path_rate=0.02,
).to(device)  # fmt: skip
print(accelerate(model))

# %% [markdown]
# ## The loop of train.py
# Automatic mixed precision, soft labels, an exponential moving average of the weights and a schedule, all of timm.

# %%
optimizer = create_optimizer_v2(model, opt="adamw", lr=4e-3, weight_decay=0.05)
scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=EPOCHS, warmup_epochs=1, warmup_lr=1e-5)
average = ModelEmaV3(model, decay=0.9)
scaler = NativeScaler(device.type) if device.type == "cuda" else None
criterion = SoftTargetCrossEntropy()


def forward(network: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.autocast(device.type, dtype=torch.float16, enabled=device.type == "cuda"):
        return network(images)


for epoch in range(EPOCHS):
    model.train()
    losses = AverageMeter()
    for images, labels in train_loader:
        images, soft = mixup(images, labels)
        loss = criterion(forward(model, images), soft)
        optimizer.zero_grad()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler(loss, optimizer, parameters=model.parameters())
        average.update(model)
        losses.update(loss.item(), len(images))
    scheduler.step(epoch + 1)
    print(f"epoch {epoch}: loss {losses.avg:.3f}")

# %% [markdown]
# ## Evaluate the averaged weights
# `ModelEmaV3` has copied the accelerated model, and so the copy runs fused as well.

# %%
average.module.eval()
top1 = AverageMeter()
with torch.no_grad():
    for images, labels in eval_loader:
        (share,) = accuracy(forward(average.module, images), labels)
        top1.update(share.item(), len(images))
print(f"top-1 {top1.avg:.1f} %")

# %% [markdown]
# ## The weights are timm's
# A checkpoint loads into the model as timm makes it, without this package, and gives the same answers.

# %%
plain = timm.create_model(
    "vit_tiny_patch16_224", img_size=SIZE, patch_size=4, embed_dim=64, depth=2, num_heads=2, num_classes=10
).to(device)
plain.load_state_dict(average.module.state_dict())
plain.eval()
with torch.no_grad():
    images = next(iter(eval_loader))[0]
    difference = (forward(plain, images) - forward(average.module, images)).abs().max().item()
print(f"largest difference from plain timm: {difference:.1e}")
