"""Train a ViT of Hugging Face transformers with its Trainer, the layers run by the fused kernels.

    python examples/hf_trainer.py

Takes a minute on a CPU; EPOCHS=2 shows that it works. Needs `transformers[torch]` and scikit-learn.
`accelerate` here is not the package of that name, which the Trainer uses by itself.
"""

# %%
import os
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from transformers import EvalPrediction, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from fastvit_kernels import accelerate

EPOCHS, OUT = float(os.environ.get("EPOCHS", "10")), os.environ.get("OUT", "runs/hf_trainer")
digits = load_digits()  # handwritten, [3, 8, 8] in [-1, 1]; the last 397 are for evaluation
pixels = torch.from_numpy(digits.images).float().div(8).sub(1)[:, None].expand(-1, 3, -1, -1)
samples = [{"pixel_values": image, "labels": label} for image, label in zip(pixels, digits.target, strict=True)]

# %% Yours will come from `from_pretrained`; this model is small and starts from random weights.
torch.manual_seed(0)
model = ViTForImageClassification(
    ViTConfig(image_size=8, patch_size=2, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
              intermediate_size=128, id2label={label: str(label) for label in range(10)},
              hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
)  # fmt: skip
print(accelerate(model))  # the only new line

# %% bf16, gradient accumulation, `torch_compile=True` and distributed training are the Trainer's, as before.
arguments = TrainingArguments(
    output_dir=OUT, num_train_epochs=EPOCHS, per_device_train_batch_size=64, learning_rate=2e-3, warmup_steps=20,
    weight_decay=0.05, bf16=torch.cuda.is_available(), logging_steps=20, save_strategy="no", report_to="none",
    disable_tqdm=True, dataloader_pin_memory=torch.cuda.is_available(),
)  # fmt: skip


def top1(predictions: EvalPrediction) -> dict[str, float]:
    return {"top1": float((np.asarray(predictions.predictions).argmax(axis=-1) == predictions.label_ids).mean())}


train_set: Any = samples[:1400]  # the Trainer takes any sequence of such dicts
eval_set: Any = samples[1400:]
trainer = Trainer(model, arguments, compute_metrics=top1, train_dataset=train_set, eval_dataset=eval_set)
trainer.train()
print(f"top-1 {trainer.evaluate()['eval_top1']:.1%}")

# %% The folder is an ordinary one, which transformers reads without this package.
trainer.save_model(f"{OUT}/model")
plain = ViTForImageClassification.from_pretrained(f"{OUT}/model").eval()
with torch.no_grad():
    difference = (plain(pixels[1400:]).logits - model.cpu().eval()(pixels[1400:]).logits).abs().max().item()
print(f"largest difference from plain transformers: {difference:.1e}")
