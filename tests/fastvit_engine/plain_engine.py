"""A `TrainingEngine` of PyTorch alone, in one process: what tests use in DeepSpeed's place."""

import math

import torch
from torch import nn

from fastvit_engine.engine.protocol import ParameterSlice


class PlainEngine:
    """A model and its optimizer; the master weights are the model's parameters."""

    replicated = True
    frozen = frozenset()
    zero_stage = 0

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model = model
        self.optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1.0)
        self.norm = None  # of the gradient, in place of the one that is there
        self._approve = lambda norm: True

    def backward(self, loss):
        loss.backward()

    def step(self):
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1e30) if self.norm is None else self.norm
        if math.isfinite(norm) and self._approve(norm):  # as most engines, it discards the others by itself
            self.optimizer.step()
        self.optimizer.zero_grad()

    def set_learning_rate(self, learning_rate):
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def approve_updates(self, approve):
        self._approve = approve

    @property
    def shapes(self):
        return {name: list(parameter.shape) for name, parameter in self.model.named_parameters()}

    def named_parameters(self):
        return list(self.model.named_parameters())

    def held_parameters(self):
        return [(name, parameter.data) for name, parameter in self.model.named_parameters()]

    def replicas(self):
        yield from (parameter.data for parameter in self.model.parameters())
        yield from self.model.buffers()

    def master_weights(self):
        return [ParameterSlice(name, 0, p.detach().view(-1)) for name, p in self.model.named_parameters()]

    def optimizer_state(self):
        found = {}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if value.ndim:
                    found.setdefault(key, []).append(ParameterSlice(name, 0, value.view(-1)))
        return found

    def optimizer_statistics(self):
        return {}

    def optimizer_shapes(self):
        state = self.optimizer_state()
        return {kind: {part.name: self.shapes[part.name] for part in parts} for kind, parts in state.items()}

    def buffers(self):
        return [ParameterSlice(name, 0, buffer.view(-1)) for name, buffer in self.model.named_buffers()]

    def running_statistics(self):
        return []

    def state_tensors(self):
        state = [value for of_one in self.optimizer.state.values() for value in of_one.values() if value.ndim]
        return [*self.model.parameters(), *self.model.buffers(), *state]

    def scalars(self):
        states = self.optimizer.state.values()
        return {f"optimizer.{k}": v.item() for state in states for k, v in state.items() if not v.ndim}

    def prepare_optimizer(self, kinds, scalars):
        self.optimizer.state.clear()
        for name, parameter in self.model.named_parameters():
            state = {kind: torch.zeros_like(parameter) for kind, names in kinds.items() if name in names}
            state |= {name.removeprefix("optimizer."): torch.tensor(value) for name, value in scalars.items()}
            if state:
                self.optimizer.state[parameter] = state

    def publish(self):
        pass

    def reset_progress(self, step):
        self.optimizer.zero_grad()

    def close(self):
        pass
