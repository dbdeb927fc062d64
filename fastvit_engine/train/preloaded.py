"""Imports what a rank imports before its first step, for the process that forks ranks: see `distributed/rank_server`.

DeepSpeed and PyTorch's compiler take most of the time. Nothing here may start a thread or open a GPU.
"""

import importlib

from fastvit_engine.engine.deepspeed import import_deepspeed

# What `fastvit train` imports only when it is needed; the last is what PyTorch imports when training begins.
_LATE = (
    "fastvit_engine.cli",
    "fastvit_engine.commands.train",
    "fastvit_engine.distributed.launch",
    "fastvit_engine.train.loop",
    "fastvit_engine.train.restarts",
    "torch._dynamo",
)

import_deepspeed()
for name in _LATE:
    importlib.import_module(name)
