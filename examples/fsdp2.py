"""Train a timm model under FSDP2 (`fully_shard`), its blocks run by the fused kernels.

    torchrun --nproc-per-node 2 examples/fsdp2.py

Processes take a GPU each if there are enough, and else share the CPU. Takes a minute on a CPU; STEPS=20 shows that it
works. Needs timm and scikit-learn.
"""

# %% [markdown]
# # Shard a model
# Accelerate first, on the whole weights: a model that is sharded already is left alone.

# %%
import os

import timm
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy

from fastvit_kernels import accelerate

STEPS, BATCH = int(os.environ.get("STEPS", "200")), 64  # images per process
rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
if on_gpu:
    torch.cuda.set_device(device)
mesh = init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),))


def vit() -> torch.nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=64, depth=2, num_heads=2, num_classes=10
    )


torch.manual_seed(0)  # the same weights in every process
model = vit().to(device)
table = accelerate(model)
if rank == 0:
    print(table)

# %% [markdown]
# ## One unit per block
# FSDP2 gathers the weights of a unit when the unit is called. A fused block reads the weights of its children without
# calling them, so a block is the smallest unit: what is inside it must not be sharded by itself.
# Weights and the residual stream are bfloat16 on a GPU; the sharded originals, gradients and AdamW are float32.

# %%
precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if on_gpu else None, reduce_dtype=torch.float32)
for block in model.get_submodule("blocks").children():
    fully_shard(block, mesh=mesh, mp_policy=precision)
fully_shard(model, mesh=mesh, mp_policy=precision)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)

# %% [markdown]
# ## Train on handwritten digits
# Each process draws batches of its own.

# %%
digits = load_digits()
scans = torch.from_numpy(digits.images).float().div(8).sub(1)[:, None].expand(-1, 3, -1, -1)
images = torch.nn.functional.interpolate(scans, size=16, mode="bilinear").to(device)  # [1797, 3, 16, 16]
labels = torch.from_numpy(digits.target).to(device)
first = 1400  # the last 397 are for evaluation
generator = torch.Generator().manual_seed(rank)
for step in range(STEPS):
    batch = torch.randint(first, (BATCH,), generator=generator).to(device)
    loss = cross_entropy(model(images[batch]).float(), labels[batch])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step == STEPS - 1:
        dist.all_reduce(mean := loss.detach().clone())
        if rank == 0:
            print(f"step {step}: loss {mean.item() / dist.get_world_size():.3f}")

# %% [markdown]
# ## Gather the weights
# Their names and shapes are timm's, so they load into the model as timm makes it.

# %%
state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    plain = vit()
    plain.load_state_dict(state)
    with torch.no_grad():
        predicted = plain.eval()(images[first:].cpu()).argmax(dim=1)
    print(f"top-1 of plain timm with these weights: {(predicted == labels[first:].cpu()).float().mean():.1%}")
dist.destroy_process_group()
