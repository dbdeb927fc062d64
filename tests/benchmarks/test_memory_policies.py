"""Steps under each memory policy: what is chosen for each, and how losses and memory are judged."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks import memory_policies
from benchmarks.memory_policies import BASE, CHECKPOINTED, GIB, KEEP_ALL, POLICIES, Policy, chosen_for
from benchmarks.shapes import GPU_SHAPES
from benchmarks.side_by_side import Measured
from benchmarks.train_variants import Setup
from fastvit_engine.distributed.world import World
from fastvit_engine.sizing.machine import Machine

H200 = Machine(processes=1, processes_per_node=1, memory=141 * 10**9, on_gpu=True)
SETUP = Setup(GPU_SHAPES[0], 64, "bf16", World(0, 1, torch.device("cuda", 0)))


@pytest.fixture
def on_an_h200(monkeypatch):
    monkeypatch.setattr(memory_policies, "machine_of", lambda world: H200)


def test_every_policy_is_what_its_name_says_and_needs_less_than_keeping_all(on_an_h200):
    chosen = {name: chosen_for(SETUP, settings(SETUP)) for name, settings in POLICIES.items()}
    needs = {name: of.memory.total for name, of in chosen.items() if name not in ("compile", "CUDA graph")}
    assert max(needs, key=lambda name: needs[name]) == BASE and len(set(needs.values())) == len(needs)
    trained = {name: of.config.train for name, of in chosen.items()}
    assert all(train.micro_batch_size == 64 for train in trained.values())
    assert [trained[f"recompute {mode}"].recompute for mode in ("gelu", "all")] == ["gelu", "all"]
    assert trained["checkpoint half"].activation_checkpointing == 16
    assert trained["offload activations"].offload_activations
    assert trained["compile"].compile and trained["CUDA graph"].cuda_graph
    assert chosen["CUDA graph"].memory.total > needs[BASE]


def test_a_budget_has_the_sizing_choose(on_an_h200):
    chosen = chosen_for(SETUP, POLICIES["memory budget"](SETUP))
    most, least = (chosen_for(SETUP, train).memory.total for train in (KEEP_ALL, CHECKPOINTED))
    assert least < chosen.memory.total <= chosen.config.train.memory_gib * GIB < most


def row(losses: list[float], *, memory: float = 10.0, predicted: float = 10.0, **of: Any) -> dict[str, Any]:
    measured = vars(Measured(losses, [100.0], [90.0], int(memory * GIB)))
    policy = {"recompute": "none", "checkpointed_blocks": 0, "memory_gib": None, "predicted_bytes": predicted * GIB}
    return measured | policy | of


def found(**variants: dict[str, Any]) -> dict[str, Any]:
    named = {name.replace("_", " "): row for name, row in variants.items()}
    return {"environment": {"gpu": "NVIDIA H200"}, "model": "H/14", "batch": 64, "variants": named}


LOSSES = [7.0, 6.9, 6.8, 6.7, 6.6, 6.5]


def test_losses_and_memory_are_judged():
    judged = found(
        keep_all=row(LOSSES),
        other_function=row([7.0, 6.8, 6.8, 6.7, 6.6, 6.5]),
        drifts_later=row([*LOSSES[:5], 5.0], memory=10.9),
        not_a_number=row([float("nan")]),
        no_longer_a_number=row([7.0, float("nan")]),
        needs_more=row(LOSSES, memory=11.2),
        over_budget=row(LOSSES, memory=9.8, memory_gib=9.5),
        broken=row([], failed=True, reason="RuntimeError: no kernel image", ms=[]),
        absent=row([], reason="needs a GPU", ms=[]),
    )
    assert memory_policies.wrong(judged) == ["other function", "not a number", "no longer a number"]
    said = {line.partition(": ")[0]: line.partition(": ")[2] for line in memory_policies.verdicts(judged)}
    assert said["keep all"] == "peak 10.0 GiB, 100 % of what was predicted, target within 10 %: met"
    assert said["drifts later"].endswith("met") and said["needs more"].endswith("MISSED")
    assert said["over budget"].startswith("peak 9.8 GiB, budget 9.5") and said["over budget"].endswith("MISSED")
    assert said["broken"] == "FAILED: RuntimeError: no kernel image" and "absent" not in said
    wrong = [line for line in memory_policies.verdicts(judged) if "WRONG" in line]
    assert wrong[0] == "other function: WRONG: the first losses differ by 1.45 %, and may by 0.5 %"
    table = memory_policies.table(judged)
    assert "| keep all | none | 0 | 100.0 | 1.000 | 640 | 90.0 | 10.0 | 10.0 | 0.000 % |" in table
    assert "| absent | needs a GPU |" in table


def test_nothing_is_recorded_of_a_policy_that_cannot_be_chosen(on_an_h200):
    policy = Policy(lambda setup: {"memory_gib": 1e-3, "recompute": "all"})
    assert policy.record() == {}


@pytest.mark.slow
@pytest.mark.distributed
def test_it_runs_on_a_cpu(tmp_path):
    chosen = ["recompute all", "checkpoint half", "offload activations"]
    words = ["-m", "benchmarks.memory_policies", "--out", str(tmp_path), "--steps", "6", "--only", *chosen]
    ended = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    record = json.loads((tmp_path / "policies.json").read_text())
    rows = record["variants"]
    assert rows[BASE]["losses"] == rows["recompute all"]["losses"] == rows["checkpoint half"]["losses"]
    assert "set train.offload_activations=false" in rows["offload activations"]["reason"]
    assert record["verdicts"] == ["memory is not judged: there is no GPU"]
    assert "| checkpoint half | none | 1 |" in (tmp_path / "policies.md").read_text()
