"""One process of a job that records what DeepSpeed sends: prints, for each case, the messages of one optimizer step.

test_traffic.py runs it, with the cases as JSON in its argument: {"stage", "precision", "passes", "zero"}.
"""

import json
import sys

import torch
import torch.distributed as dist

from fastvit_engine.config import Config
from fastvit_engine.data.stream.batch_split import BatchSplit
from fastvit_engine.distributed.world import join_world
from fastvit_engine.engine.build import build_engine
from fastvit_engine.models import build_vit

sent = []
# By the operation's name, its argument that is as large as what each process has in the end, or had at the start.
LARGEST = {
    "all_reduce": ("tensor", 0),
    "reduce": ("tensor", 0),
    "broadcast": ("tensor", 0),
    "all_gather_into_tensor": ("output_tensor", 0),
    "reduce_scatter_tensor": ("input", 1),
}
SAME = {"all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}


def record(name, argument, position):
    operation = getattr(dist, name)

    def recorded(*arguments, **named):
        tensor = named[argument] if argument in named else arguments[position]
        sent.append((SAME.get(name, name), tensor.nbytes))
        return operation(*arguments, **named)

    setattr(dist, name, recorded)


def issued(case, world):
    config = Config.model_validate(case["config"])
    torch.manual_seed(0)
    model = build_vit(config.model, mean=(0.5,) * 3, std=(0.5,) * 3)
    if config.optimizer.frozen == "backbone":
        model.freeze_backbone()
    passes = case["passes"]
    engine = build_engine(model, config, BatchSplit(2 * passes * world.size, world.size, passes), world)
    engine.model.train()
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    for _ in range(3):  # DeepSpeed learns the order of the modules in the first or second
        sent.clear()
        for _ in range(passes):
            engine.backward(engine.model(images).float().square().mean())
            engine.step()
    found = list(sent)
    engine.close()
    return found


for name, (argument, position) in LARGEST.items():
    record(name, argument, position)
with join_world() as world:
    for case in json.loads(sys.argv[1]):
        found = issued(case, world)
        if world.is_main:
            print("issued", json.dumps(found), flush=True)
