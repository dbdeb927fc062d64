"""One process of a job that counts what DeepSpeed allocates: prints, for each case, bytes after two optimizer steps.

test_memory.py runs it, with the cases as JSON in its argument: {"precision", "stage", "reduce", "optimizer"}, and, if
they are not the usual, {"offload", "average", "model", "checkpointed"}. Printed are two figures each: after the
backward pass, and before it, with what autograd keeps.
"""

import gc
import json
import sys
import time
from functools import partial

import torch
from torch.autograd.graph import saved_tensors_hooks

from fastvit_engine.config import Config
from fastvit_engine.data.stream.batch_split import BatchSplit
from fastvit_engine.distributed.world import join_world
from fastvit_engine.engine.build import build_engine
from fastvit_engine.engine.ema import WeightAverage
from fastvit_engine.models import build_vit

MODEL = {"name": "Ti/16", "image_size": 32, "num_classes": 10, "depth": 2}


def storages(kept=()):
    """Bytes of every tensor storage in this process, by address; held, so that no address is used again.

    kept: those that autograd keeps, which Python does not see.
    """
    gc.collect()
    found = {storage.data_ptr(): storage for storage in kept}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu" and thing.layout == torch.strided:
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage
    return found


def new_bytes(before, kept=()):
    """Bytes beyond `before`, once they stay the same: a thread of Gloo lets go of its operands a little late."""
    last = None
    while True:
        now = sum(storage.nbytes() for address, storage in storages(kept).items() if address not in before)
        if now == last:
            return now
        last = now
        time.sleep(0.05)


def measure(case, world):
    before = storages()
    zero = {"reduce_bucket_size": case["reduce"], "overlap_comm": False, "stage3_param_persistence_threshold": 0}
    config = Config.model_validate(
        {
            "model": MODEL | case.get("model", {}),
            "train": {"precision": case["precision"]},
            "zero": {"stage": case["stage"], "offload": case.get("offload", "none")},
            "optimizer": case["optimizer"],
            "deepspeed": {"zero_optimization": zero},
        }
    )
    model = build_vit(config.model, mean=(0.5,) * 3, std=(0.5,) * 3)
    if config.optimizer.frozen == "backbone":
        model.freeze_backbone()
    model.checkpoint_blocks(case.get("checkpointed", 0))
    engine = build_engine(model, config, BatchSplit(4 * world.size, world.size, 2), world)
    del model
    engine.model.train()
    images = torch.zeros(2, config.model.image_size, config.model.image_size, 3, dtype=torch.uint8)
    average = WeightAverage(engine, 0.9) if case.get("average") else None
    largest = whole = 0
    for micro_step in range(4):
        kept = []
        with saved_tensors_hooks(partial(keep, kept), lambda tensor: tensor):
            loss = engine.model(images).float().square().mean()
        if micro_step == 3:  # with the gradients of the micro-batch before
            whole = new_bytes(before, kept)
        del kept
        engine.backward(loss)
        del loss
        if micro_step >= 2:  # moments are there from the second step on
            largest = max(largest, new_bytes(before))
        engine.step()
        if average is not None and micro_step % 2:
            average.update(micro_step // 2)
    engine.close()
    return largest, whole


def keep(kept, tensor):
    kept.append(tensor.untyped_storage())
    return tensor


with join_world() as world:
    measured = [figure for case in json.loads(sys.argv[1]) for figure in measure(case, world)]
    largest = world.max(measured).tolist()
    if world.is_main:
        print("measured", json.dumps(largest), flush=True)
