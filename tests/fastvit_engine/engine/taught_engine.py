"""A few steps of a tiny model by an engine with the shorter ways of gradients, or with DeepSpeed's own.

As a program, one process of a job: its argument is a list of (stage, precision) as JSON; it prints each both ways.
"""

import json
import sys
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn

from fastvit_engine.distributed.world import join_world
from fastvit_engine.engine import deepspeed as module
from fastvit_engine.engine.deepspeed import initialize

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OPERATIONS = {"all_reduce": 0, "all_gather_into_tensor": 0, "reduce_scatter_tensor": 1}


class Model(nn.Module):
    """Two layers, of which the second may be left out."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(12, 21), nn.Linear(21, 21), nn.LayerNorm(21)

    def forward(self, inputs, both):
        hidden = self.first(inputs)
        return self.norm(hidden + self.second(hidden) if both else hidden)


def teach(stage, precision, *, shortened):
    """Losses, gradient norms and final weights, by name."""
    torch.manual_seed(0)
    model, norms, losses = Model(), [], []
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {  # buckets smaller than the largest parameter
            "stage": stage,
            "reduce_bucket_size": 300,
            "overlap_comm": False,
            "stage3_param_persistence_threshold": 0,
        },
        "bf16": {"enabled": precision == "bf16"},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if precision == "bf16" else {}),
    }
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    if shortened:
        engine = initialize(model, optimizer, settings)
    else:
        with patch.multiple(module, shorten_zero_1_and_2=lambda of: None, shorten_zero_3=lambda of: None):
            engine = initialize(model, optimizer, settings)
    engine.approve_updates(lambda norm: norms.append(float(norm)) or len(losses) != 6)  # all but the third
    generator = torch.Generator().manual_seed(1 + dist.get_rank())

    def one_pass(both=True):
        inputs = torch.randn(4, 12, generator=generator).to(DTYPES[precision])
        outputs = engine.model(inputs, both).float()
        loss = (outputs - torch.linspace(-1, 1, 21)).square().mean()
        engine.backward(loss)
        return loss.item()

    for step in range(6):
        for _ in range(2):
            # Stage 3 of DeepSpeed updates what is left out by its last gradient. At the other stages it does not send
            # what is left out, and the engine sends zeros.
            losses.append(one_pass(both=stage == 3 or dist.get_world_size() > 1 or step != 1))
            engine.step()
        if step == 3:  # an unfinished step, dropped
            one_pass()
            engine.reset_progress(step + 1)
    taught = {"losses": losses, "norms": norms}
    for part in engine.master_weights():
        taught[part.name] = part.values.tolist()
    engine.close()
    return taught


if __name__ == "__main__":
    sent = []

    def record(name, position):
        operation = getattr(dist, name)

        def recorded(*arguments, **named):
            tensor = arguments[position] if len(arguments) > position else next(iter(named.values()))
            sent.append((name, tensor.nbytes))
            return operation(*arguments, **named)

        setattr(dist, name, recorded)

    for name, position in OPERATIONS.items():
        record(name, position)
    with join_world() as world:
        for stage, precision in json.loads(sys.argv[1]):
            for shortened in (True, False):
                sent.clear()
                taught = teach(stage, precision, shortened=shortened)
                if world.is_main:
                    print("taught", json.dumps({**taught, "sent": sent}), flush=True)
