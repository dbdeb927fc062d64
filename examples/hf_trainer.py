"""Train a ViT of Hugging Face transformers with its Trainer, the layers run by the fused kernels.

    python examples/hf_trainer.py

Takes a minute on a CPU; EPOCHS=2 shows that it works. Needs `transformers[torch]` and scikit-learn.
"""

# %% [markdown]
# # The Trainer, as always
# One line is new: `accelerate(model)`, before the model is handed to the Trainer.
# (It is not the package `accelerate`, which the Trainer uses by itself.)

# %%
import os
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from fastvit_kernels import accelerate

EPOCHS, OUT = float(os.environ.get("EPOCHS", "10")), Path(os.environ.get("OUT", "runs/hf_trainer"))


class Digits(Dataset):
    """Handwritten digits, [3, 8, 8] in [-1, 1], as the Trainer collates them."""

    def __init__(self, part: slice) -> None:
        digits = load_digits()
        self.pixels = torch.from_numpy(digits.images[part]).float().div(8).sub(1)[:, None].expand(-1, 3, -1, -1)
        self.labels = torch.from_numpy(digits.target[part])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


train_set, eval_set = Digits(slice(None, 1400)), Digits(slice(1400, None))

# %% [markdown]
# ## The model
# Yours will come from `ViTForImageClassification.from_pretrained`; this one is small and starts from random weights.

# %%
torch.manual_seed(0)
model = ViTForImageClassification(
    ViTConfig(
        image_size=8, patch_size=2, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        id2label={label: str(label) for label in range(10)}, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )
)  # fmt: skip
print(accelerate(model))

# %% [markdown]
# ## Train
# `bf16=True`, gradient accumulation, `torch_compile=True` and distributed training are the Trainer's as before.

# %%
arguments = TrainingArguments(
    output_dir=str(OUT),
    num_train_epochs=EPOCHS,
    per_device_train_batch_size=64,
    per_device_eval_batch_size=128,
    learning_rate=2e-3,
    warmup_steps=20,
    weight_decay=0.05,
    bf16=torch.cuda.is_available(),
    logging_steps=20,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    dataloader_pin_memory=torch.cuda.is_available(),
)


def top1(predictions: EvalPrediction) -> dict[str, float]:
    logits, labels = np.asarray(predictions.predictions), predictions.label_ids
    return {"top1": float((logits.argmax(axis=-1) == labels).mean())}


trainer = Trainer(model, arguments, train_dataset=train_set, eval_dataset=eval_set, compute_metrics=top1)
trainer.train()
print(f"top-1 {trainer.evaluate()['eval_top1']:.1%}")

# %% [markdown]
# ## Save and load
# The folder is an ordinary one, which transformers reads without this package.

# %%
trainer.save_model(str(OUT / "model"))
plain = ViTForImageClassification.from_pretrained(OUT / "model").eval()
fused = model.cpu().eval()
images = torch.stack([eval_set[index]["pixel_values"] for index in range(64)])
with torch.no_grad():
    difference = (plain(images).logits - fused(images).logits).abs().max().item()
print(f"largest difference from plain transformers: {difference:.1e}")
