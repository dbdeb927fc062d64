"""Capture a training step in a CUDA graph: the CPU then launches one graph per step, not hundreds of kernels.

    python examples/cuda_graph.py

Without a GPU it says so, and runs the same step eagerly. STEPS=20 shows that it works. Needs timm and scikit-learn.
"""

# %%
import os

import timm
import torch
from sklearn.datasets import load_digits

from fastvit_kernels import accelerate

STEPS, BATCH = int(os.environ.get("STEPS", "200")), 128
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
digits = load_digits()
scans = torch.from_numpy(digits.images).float().div(8).sub(1).to(device)[:, None].expand(-1, 3, -1, -1)
classes = torch.from_numpy(digits.target).to(device)
model = timm.create_model("test_vit", img_size=8, patch_size=4, num_classes=10)
accelerate(model.to(device))

# %% What changes from step to step is in tensors: the batch, the learning rate, Adam's count of steps, the loss.
x, y, rate = scans[:BATCH].clone(), classes[:BATCH].clone(), torch.tensor(2e-3, device=device)
optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True, capturable=True)
last_loss = torch.zeros((), device=device)


def step() -> None:
    with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()  # to None: the gradients of a graph are in its own memory
    last_loss.copy_(loss.detach())


# %% A capture records the launches, and runs nothing. The steps before it train, compile kernels and allocate.
run = step
if device.type == "cuda":
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        step()
        step()
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        step()
    run = graph.replay
print("no GPU, so no CUDA graph: the same step runs eagerly" if device.type == "cpu" else "each step is a CUDA graph")
for number in range(STEPS):
    drawn = torch.randint(len(scans), (BATCH,), device=device)
    x.copy_(scans[drawn])
    y.copy_(classes[drawn])
    rate.fill_(2e-3 * (1 - number / STEPS))
    run()
    if number % 50 == 0 or number == STEPS - 1:
        print(f"step {number}  loss {last_loss.item():.4f}")
