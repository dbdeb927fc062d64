import os

import torch

# Without a GPU, Triton kernels are tested by Triton's interpreter, on the CPU. Triton reads this when it is imported,
# so it is set here, before any test module is. It changes nothing for tests that run no Triton kernel.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
