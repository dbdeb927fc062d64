"""The processes of a job and the memory that each has."""

import os
from dataclasses import dataclass, replace

import torch

from fastvit_engine.control_groups import memory_limit
from fastvit_engine.cores import cores_here
from fastvit_engine.distributed.world import World

# Allowances, not measurements. GPU: CUDA context, libraries and NCCL's buffers; holes in the allocator's memory.
# CPU: data workers, page cache and the rest of the machine.
_GPU_RESERVED = 3 * 2**29
_GPU_USABLE = 0.92
_CPU_USABLE = 0.75


@dataclass(frozen=True)
class Machine:
    """The processes of a job and the device that each has."""

    processes: int
    processes_per_node: int
    memory: int  # bytes of each process's device; of the smallest if they differ
    on_gpu: bool
    cores: int | None = None  # of each process, 0 if there are more processes than cores; None: not known
    budget: int | None = None  # bytes for model and activations, if that is less than there is; None: all

    @property
    def usable(self) -> int:
        """Bytes for model and activations."""
        there = int((self.memory - _GPU_RESERVED) * _GPU_USABLE if self.on_gpu else self.memory * _CPU_USABLE)
        return there if self.budget is None else min(self.budget, there)

    def within(self, gib: float | None) -> "Machine":
        """The same with train.memory_gib as its budget."""
        return self if gib is None else replace(self, budget=int(gib * 2**30))

    @property
    def device(self) -> str:
        return "GPU" if self.on_gpu else "process"


def machine_of(world: World) -> Machine:
    """The machine this job runs on; collective."""
    on_gpu = world.device.type == "cuda"
    per_node = len(world.node_ranks)
    here = [device_memory(per_node, on_gpu=on_gpu), per_node, cores_here() // per_node]
    memory, per_node, cores = (-world.max([-figure for figure in here])).long().tolist()
    return Machine(world.size, per_node, memory, on_gpu, cores)


def machine_here(processes: int) -> Machine:
    """This machine, with all processes of a job on it."""
    on_gpu = torch.cuda.is_available()
    return Machine(processes, processes, device_memory(processes, on_gpu=on_gpu), on_gpu, cores_here() // processes)


def device_memory(processes_per_node: int, *, on_gpu: bool) -> int:
    """Bytes of the current GPU, or this process's share of the memory that the machine or its container has."""
    if on_gpu:
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    allowed = memory_limit()
    return (total if allowed is None else min(total, allowed.limit)) // processes_per_node
