"""Optimizers on what ZeRO would give them, in ranks that are threads of one process: no DeepSpeed is needed."""

import threading

import torch

from fastvit_engine.config import OptimizerConfig
from fastvit_engine.engine.optimizers.groups import RATE_SCALE, parameter_groups
from fastvit_engine.engine.optimizers.kinds import KINDS
from fastvit_engine.engine.optimizers.partition import Partition, PartitionedOptimizer, Span
from tests.fastvit_engine.ranks import ThreadWorld, on_ranks

RATES = (0.1, 0.05, 0.02)
_here = threading.local()  # its `world` is the rank that this thread is


def use_threads(monkeypatch):
    """Lets `torch.distributed` connect the threads of `on_ranks`."""

    def all_reduce(tensor):
        tensor.copy_(_here.world.sum(tensor.clone()))

    def all_gather_object(found, value):
        found[:] = _here.world.gather(value)

    def all_to_all_single(received, sent, received_sizes, sent_sizes):
        parts = _here.world.gather([part.clone() for part in sent.split(sent_sizes)])
        mine = [of_rank[_here.world.rank] for of_rank in parts]
        assert [len(part) for part in mine] == received_sizes
        received.copy_(torch.cat(mine))

    own = {
        "get_rank": lambda: _here.world.rank,
        "get_world_size": lambda: _here.world.size,
        "all_reduce": all_reduce,
        "all_gather_object": all_gather_object,
        "all_to_all_single": all_to_all_single,
    }
    for name, function in own.items():
        monkeypatch.setattr(torch.distributed, name, function)


def gradient(name, shape, step):
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * step)
    return torch.randn(shape, generator=generator) * 0.1


class Rank:
    """A rank whose optimizer has the whole parameters, or under ZeRO its equal part of each group, flattened."""

    def __init__(self, world: ThreadWorld, model, settings: OptimizerConfig, *, sharded: bool) -> None:
        _here.world, kind = world, KINDS[settings.kind]
        self.world, self.sharded = world, sharded
        self.whole = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = parameter_groups(model, settings, kind.apart)
        for group in groups:
            group["params"] = [names[id(parameter)] for parameter in group["params"]]
        self.partitions = []
        for group in groups:
            made = [self._cut(group["params"])] if sharded else [self._keep(name) for name in group["params"]]
            self.partitions += made
            group["params"] = [partition.tensor for partition in made]
        self.optimizer = kind.build(groups, settings)
        if isinstance(self.optimizer, PartitionedOptimizer):
            shapes = {name: list(tensor.shape) for name, tensor in self.whole.items()}
            self.optimizer.attach(self.partitions, shapes, replicated=not sharded, device=torch.device("cpu"))

    def _keep(self, name) -> Partition:
        tensor = torch.nn.Parameter(self.whole[name].clone())
        return Partition(tensor, [Span(name, 0, 0, tensor.numel())], [name])

    def _cut(self, names) -> Partition:
        size = -(-sum(self.whole[name].numel() for name in names) // self.world.size)
        tensor, spans, begin = torch.zeros(size), [], 0
        for name in names:
            values = self.whole[name].flatten()
            first = max(begin, self.world.rank * size)
            last = min(begin + len(values), (self.world.rank + 1) * size)
            if first < last:
                spans.append(Span(name, first - begin, first - self.world.rank * size, last - first))
                tensor[spans[-1].offset :][: last - first] = values[first - begin : last - begin]
            begin += len(values)
        return Partition(torch.nn.Parameter(tensor), spans, list(names))

    def step(self, number: int) -> None:
        for partition in self.partitions:
            partition.tensor.grad = torch.zeros_like(partition.tensor)
            for span in partition.spans:
                values = gradient(span.name, self.whole[span.name].shape, number).flatten()
                partition.tensor.grad.view(-1)[span.offset :][: span.count] = values[span.start :][: span.count]
        self.optimizer.step()

    def weights(self) -> dict:
        """The whole weights; collective."""
        own = [part for partition in self.partitions for part in partition.slices(partition.tensor)]
        whole = {name: tensor.flatten() for name, tensor in self.whole.items()}
        for parts in self.world.gather([(part.name, part.start, part.values.clone()) for part in own]):
            for name, start, values in parts:
                whole[name][start : start + len(values)] = values
        return {name: values.view(self.whole[name].shape) for name, values in whole.items()}


def trained(make_model, settings: OptimizerConfig, *, processes: int, sharded: bool):
    """The whole weights after a step at each of RATES, as each rank has them."""
    model = make_model()  # once: threads share one random generator

    def run(world):
        rank = Rank(world, model, settings, sharded=sharded)
        for step, rate in enumerate(RATES):
            for group in rank.optimizer.param_groups:
                group["lr"] = rate * group[RATE_SCALE]
            rank.step(step)
        return rank.weights()

    return on_ranks(processes, run)
