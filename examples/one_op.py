"""Call one operation by itself: residual addition and LayerNorm in one pass, forward and backward.

    python examples/one_op.py

Runs plain PyTorch on a CPU and the Triton kernel on a GPU, and compares both with PyTorch in float64.
"""

# %% [markdown]
# # One operation
# `explain` says what each operation runs on this machine, and why. `FASTVIT_KERNELS` changes it.

# %%
import torch
from torch.nn.functional import layer_norm as torch_layer_norm

from fastvit_kernels import add_layer_norm, explain

print(explain())
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)
batch, tokens, width = 8, 197, 384
x, branch = (torch.randn(batch, tokens, width, device=device, requires_grad=True) for _ in range(2))
weight, bias = (torch.randn(width, device=device, requires_grad=True) for _ in range(2))

# %% [markdown]
# ## Forward and backward
# The sum continues as the residual stream; the normalised rows go into the next layer.

# %%
total, normalised = add_layer_norm(x, branch, weight, bias, eps=1e-6)
upstream = torch.randn_like(normalised)
gradients = torch.autograd.grad((normalised * upstream).sum() + total.sum(), (x, branch, weight, bias))

# %% [markdown]
# ## The same in float64

# %%
exact = [tensor.detach().double().requires_grad_() for tensor in (x, branch, weight, bias)]
exact_total = exact[0] + exact[1]
exact_normalised = torch_layer_norm(exact_total, (width,), exact[2], exact[3], eps=1e-6)
expected = torch.autograd.grad((exact_normalised * upstream.double()).sum() + exact_total.sum(), exact)

for name, found, right in zip(
    ("total", "normalised", "d x", "d branch", "d weight", "d bias"),
    (total, normalised, *gradients),
    (exact_total, exact_normalised, *expected),
    strict=True,
):
    error = (found - right).norm() / right.norm()
    print(f"{name}: relative error {error.item():.1e}")
    assert error < 1e-5, name
