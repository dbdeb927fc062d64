"""AdamW and LAMB by the kernels of NVIDIA's apex, with the groups and the state of this engine's own.

FusedAdam and FusedLAMB count steps per group, where checkpoints would not find them. So they are made anew for each
update, from what is kept here as PyTorch's AdamW keeps it: a checkpoint is the same whichever kernels trained.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from fastvit_engine.config import Config, OptimizerConfig
from fastvit_engine.engine.optimizers.adam import KINDS_OF_STATE
from fastvit_engine.engine.optimizers.closure import loss_of
from fastvit_engine.engine.optimizers.groups import ParameterGroups
from fastvit_engine.errors import UserError
from fastvit_engine.nvidia_apex import obstacle


class FusedClass(NamedTuple):
    """An optimizer of apex, and the settings with which it computes what the engine's own does."""

    module: str
    name: str
    settings: dict[str, Any]


# By `optimizer.kind`. FusedLAMB would clip the gradients, which the engine has done.
CLASSES = {
    "adamw": FusedClass("apex.optimizers.fused_adam", "FusedAdam", {"adam_w_mode": True}),
    "lamb": FusedClass("apex.optimizers.fused_lamb", "FusedLAMB", {"adam_w_mode": True, "max_grad_norm": float("inf")}),
}


class ApexOptimizer(Optimizer):
    """Updates by a fused optimizer of apex. State: `exp_avg`, `exp_avg_sq` and, on the host, `step`.

    make: builds apex's optimizer of groups, of which each has `step`, the number of updates so far.
    """

    def __init__(self, groups: ParameterGroups, defaults: dict[str, Any], make: Callable[..., Optimizer]) -> None:
        super().__init__(groups, defaults)
        self._make = make

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = loss_of(closure)
        groups, held = [], []
        for group in self.param_groups:
            tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
            if tensors:
                done = int(self.state[tensors[0]].get("step", 0))
                groups.append({**{name: group[name] for name in self.defaults}, "params": tensors, "step": done})
                held.append((tensors, done + 1))
        if not groups:  # an update that was not approved
            return loss
        fused = self._make(groups)
        for tensors, step in held:
            for tensor in tensors:
                state = self.state[tensor]
                for kind in KINDS_OF_STATE:
                    if kind not in state:
                        state[kind] = torch.zeros_like(tensor)
                fused.state[tensor] = {kind: state[kind] for kind in KINDS_OF_STATE}
                state["step"] = torch.tensor(float(step))
        fused.step()
        return loss


def build_apex(groups: ParameterGroups, settings: OptimizerConfig) -> Optimizer:
    """The optimizer of a configuration whose `optimizer.kernels` are apex's, which must be usable here."""
    module, name, fixed = CLASSES[settings.kind]
    fused = getattr(importlib.import_module(module), name)
    defaults = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.eps, "weight_decay": 0.0}
    return ApexOptimizer(groups, defaults, lambda groups: fused(groups, **fixed))


def check_apex(config: Config, *, on_gpu: bool | None = None) -> None:
    """Raises UserError if the configuration asks for apex's kernels, and they cannot be used on this machine.

    on_gpu: whether processes have a GPU each; None: if this machine has one.
    """
    settings = config.optimizer
    if settings.kernels != "apex":
        return
    fused = CLASSES[settings.kind]
    if not (torch.cuda.is_available() if on_gpu is None else on_gpu):
        raise UserError(f"optimizer.kernels = apex: {fused.name} needs a GPU: set optimizer.kernels=torch on a CPU")
    if (reason := obstacle(fused.module)) is not None:
        raise UserError(f"optimizer.kernels = apex: {reason}, or set optimizer.kernels=torch")
    try:
        getattr(importlib.import_module(fused.module), fused.name)
    except Exception as error:  # whatever a package that was built for another PyTorch throws
        first = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(
            f"optimizer.kernels = apex: {fused.module} does not import ({type(error).__name__}: {first}): build apex "
            "again for this PyTorch, or set optimizer.kernels=torch"
        ) from error
