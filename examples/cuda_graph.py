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

# %% What changes from step to step is in tensors: the batch, the learning rate, and Adam's count of steps.
x, y, rate = scans[:BATCH].clone(), classes[:BATCH].clone(), torch.tensor(2e-3, device=device)
optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True, capturable=True)


def step() -> torch.Tensor:
    with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()  # to None: the gradients of a graph are in its own memory
    return loss.detach()


# %% A capture records the launches, and runs nothing. The steps before it train, compile kernels and allocate.
if device.type == "cuda":
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
else:
    print("no GPU, so no CUDA graph: the same step runs eagerly")

for number in range(STEPS):
    drawn = torch.randint(len(scans), (BATCH,), device=device)
    x.copy_(scans[drawn])
    y.copy_(classes[drawn])
    rate.fill_(2e-3 * (1 - number / STEPS))
    loss = step() if device.type == "cpu" else (graph.replay(), loss)[1]  # a replay writes its loss again
    if number % 50 == 0 or number == STEPS - 1:
        print(f"step {number}  loss {loss.item():.4f}")
