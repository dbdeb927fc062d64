"""Train a timm model under FSDP2 (`fully_shard`), its blocks run by the fused kernels.

torchrun --nproc-per-node 2 examples/fsdp2.py   # STEPS=20 shows that it works
"""

# %%
import os
from typing import Any

import timm
import torch
from sklearn.datasets import load_digits
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy, interpolate

from fastvit_kernels import accelerate

STEPS, BATCH, first = int(os.environ.get("STEPS", "200")), 64, 1400  # images from `first` on are for evaluation
device, on_gpu = torch.device("cpu"), torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
if on_gpu:
    torch.cuda.set_device(device := torch.device("cuda", int(os.environ["LOCAL_RANK"])))
mesh = dist.init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),))
SHAPE: Any = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10}

# %% Accelerate first: a model that is sharded already is left alone. The seed gives every process the same weights.
torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224", **SHAPE).to(device)
table = str(accelerate(model))
# A block is the smallest unit to shard: it reads the weights of its children without calling them. States are fp32.
precision = MixedPrecisionPolicy(torch.bfloat16 if on_gpu else None, reduce_dtype=torch.float32)
for module in (*model.get_submodule("blocks").children(), model):
    fully_shard(module, mesh=mesh, mp_policy=precision)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)

# %% Train on handwritten digits. Each process draws batches of its own.
digits, generator = load_digits(), torch.Generator().manual_seed(dist.get_rank())
scans = torch.from_numpy(digits.images).float().div(8).sub(1)[:, None].expand(-1, 3, -1, -1)
images, labels = interpolate(scans, size=16).to(device), torch.from_numpy(digits.target).to(device)
for step in range(STEPS):
    batch = torch.randint(first, (BATCH,), generator=generator).to(device)
    loss = cross_entropy(model(images[batch]).float(), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if dist.get_rank() == 0 and step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f} on rank 0")

# %% Gather the weights: names and shapes are timm's, so they load into the model as timm makes it.
state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if dist.get_rank() == 0:
    print(table)
    plain = timm.create_model("vit_tiny_patch16_224", **SHAPE).eval()
    plain.load_state_dict(state)
    with torch.no_grad():
        top1 = (plain(images[first:].cpu()).argmax(dim=1) == labels[first:].cpu()).float().mean()
    print(f"top-1 of plain timm with these weights: {top1:.1%}")
dist.destroy_process_group()
