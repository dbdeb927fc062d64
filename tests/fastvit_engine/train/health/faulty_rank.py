"""Faults of a rank: what FASTVIT_FAULTS asks for happens in it, from outside the engine.

The variable holds a JSON list of faults, each an object with `what` and, where it applies, the `rank` it happens on:

* {"what": "bad_sample", "key": K}                 the loss of sample K is NaN, whenever it is computed
* {"what": "loud_sample", "key": K, "times": X}    likewise, X times what it should be
* {"what": "gradient", "step": S, "rank": R}       the gradient of one parameter is NaN on rank R in step S, once
* {"what": "bad_gradient", "key": K}               likewise, on the rank that has sample K, whenever it is computed
* {"what": "weight", "step": S, "rank": R}         before step S an element of a weight becomes NaN on rank R, once
* {"what": "bit", "step": S, "rank": R}            before step S the lowest bit of an element is flipped on rank R, once

S counts from 0, in steps of the run. Copying for a checkpoint lasts as long as several steps, as if the model were
large: so every rewind also shows that no update came before its end.
"""

import json
import os
import time

import torch

from fastvit_engine.checkpoint.writer import HostCopy
from fastvit_engine.objectives.classify import Classify
from fastvit_engine.train import loop

PARAMETER = "blocks.0.mlp.fc1.weight"
FAULTS = []  # of this process
came = []  # faults that come once, and came
jobs = []  # of this process: one
hooks = []  # of the step in progress


def with_bad_samples(losses_of):
    def wrapped(self, model, batch):
        losses = losses_of(self, model, batch)
        for fault in FAULTS:
            if fault.get("key") not in batch.keys:
                continue
            if fault["what"] == "bad_gradient":
                spoil_gradient()
            else:
                factor = torch.ones(len(losses))
                factor[batch.keys.index(fault["key"])] = fault.get("times", float("nan"))
                losses = losses * factor
        return losses

    return wrapped


def with_faults(take_step):
    def wrapped(job, step, micro_batches, **options):
        jobs[:] = [job]
        for fault in FAULTS:
            if fault.get("step") != step or fault["rank"] != job.world.rank or fault in came:
                continue
            came.append(fault)
            if fault["what"] == "gradient":
                spoil_gradient()
            else:
                held = dict(job.engine.held_parameters())[PARAMETER]
                if fault["what"] == "weight":
                    held.view(-1)[7] = float("nan")
                else:
                    held.view(-1).view(torch.int32)[7] ^= 1
        try:
            return take_step(job, step, micro_batches, **options)
        finally:
            while hooks:
                hooks.pop().remove()

    return wrapped


def slowly(copy):
    def wrapped(self, *what):
        time.sleep(0.2)
        copy(self, *what)

    return wrapped


def spoil_gradient():
    """As broken hardware would: before anything else sees the gradient."""
    hooks.append(dict(jobs[0].engine.named_parameters())[PARAMETER].register_hook(spoil))
    if jobs[0].health.gradients.on:  # hooks are called in the order of their registration
        jobs[0].health.gradients.stop()
        jobs[0].health.gradients.start()


def spoil(gradient):
    spoilt = gradient.clone()
    spoilt.view(-1)[3] = float("nan")
    return spoilt


def make_faulty():
    """What a rank calls before it begins."""
    FAULTS[:] = json.loads(os.environ["FASTVIT_FAULTS"])
    Classify.losses = with_bad_samples(Classify.losses)
    loop.take_step = with_faults(loop.take_step)
    HostCopy._copy = slowly(HostCopy._copy)
