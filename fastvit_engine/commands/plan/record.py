"""A plan as one JSON object."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastvit_engine.data.stream.batch_split import split_batch
from fastvit_engine.engine.build import deepspeed_config
from fastvit_engine.sizing.copies import copies_bytes, keeps_copies
from fastvit_engine.sizing.needs import SAVED_WITHIN
from fastvit_engine.sizing.scaling import as_rows


def as_json(gpu: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """found: what `fastvit plan` has computed."""
    chosen, speed = found["chosen"], found["speed"]
    machine = chosen.machine
    split = split_batch(chosen.config, machine.processes)
    nodes = machine.processes // machine.processes_per_node
    stages = [
        {
            **row,
            "memory": {**asdict(row["memory"]), "total": row["memory"].total},
            "fits": row["memory"].total <= machine.usable,
        }
        for row in found["stages"]
    ]
    policies = [
        {
            **policy.settings,
            "memory": {**asdict(policy.memory), "total": policy.memory.total},
            "fits": policy.memory.total <= machine.usable,
            "largest_micro_batch": policy.largest_micro_batch,
            "computed_again": policy.again,
        }
        for policy in found["policies"]
    ]
    return {
        "gpus": machine.processes,
        "gpu": gpu,
        "gpus_per_node": machine.processes_per_node,
        "gpu_memory": machine.memory,
        "gpu_memory_usable": machine.usable,
        "stages": stages,
        "policies": policies,
        "zero_stage": chosen.config.zero.stage,
        "micro_batch_size": split.micro_batch_size,
        "accumulation_steps": split.accumulation_steps,
        **chosen.record(),
        "deepspeed": deepspeed_config(chosen.config, split, on_gpu=machine.on_gpu),
        "samples_per_epoch": chosen.config.data.epoch_samples,
        "assumed_mfu": found["assumed_mfu"],
        **found["time"],
        **found["cost"],
        "needs": {**asdict(found["needs"]), "sample_bytes": found["sample_bytes"], "saved_within": SAVED_WITHIN},
        "copies_bytes": copies_bytes(chosen.config, nodes)
        if keeps_copies(chosen.config, on_gpu=machine.on_gpu, nodes=nodes)
        else 0,  # on each node
        "nodes": found["nodes"],
        "scaling": as_rows(found["scaling"], measured=speed.image.measured),
    }
