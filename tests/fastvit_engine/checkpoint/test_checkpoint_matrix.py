"""A checkpoint of any world size, ZeRO stage and precision is read by any other, to the bit.

Continuous integration goes a few ways through the matrix; FASTVIT_TEST_RESUMES=all goes all of them.
"""

import json
import os
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

from fastvit_engine.checkpoint import Checkpoint, open_store
from fastvit_engine.checkpoint.reader import CheckpointReader
from fastvit_engine.engine.protocol import ParameterSlice
from tests.fastvit_engine.warm_rank import run_program
from tests.fastvit_engine.warm_ranks import exit_codes_of

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ALL = os.environ.get("FASTVIT_TEST_RESUMES") == "all"
PROGRAM = Path(__file__).with_name("checkpoint_matrix.py")
SAVED = "step-00000004"
STAGES = (0, 1, 2, 3)
ROUNDING = ("muon", "adafactor")  # to bf16 in the update, where the last bit of a sum may tip a number
OTHERS = {  # what else the configuration allows, each written by two processes
    "bf16-0": {"stage": 0, "precision": "bf16"},
    "bf16-1": {"stage": 1, "precision": "bf16", "micro_batch_size": 2},
    "offload-3": {"stage": 3, "precision": "bf16", "offload": "all"},  # with parameters that stay whole
    "muon-2": {"stage": 2, "optimizer": {"kind": "muon"}},  # other state for some parameters
    "adafactor-1": {"stage": 1, "optimizer": {"kind": "adafactor"}},  # and state of other shapes
}
MORE_OTHERS = {
    "bf16-2": {"stage": 2, "precision": "bf16"},
    "bf16-3": {"stage": 3, "precision": "bf16", "shard_all": True},
    "offload-1": {"stage": 1, "offload": "optimizer"},
    "offload-2": {"stage": 2, "precision": "bf16", "offload": "optimizer"},
    "offload-3-fp32": {"stage": 3, "offload": "all", "shard_all": True},
    "offload-3-optimizer": {"stage": 3, "offload": "optimizer"},
    "accumulation-0": {"stage": 0, "micro_batch_size": 2},
    "accumulation-2": {"stage": 2, "precision": "bf16", "micro_batch_size": 2},
    "accumulation-3": {"stage": 3, "micro_batch_size": 2, "shard_all": True},
}


KINDS = {  # of state, besides weights and average
    "sgd": {"momentum_buffer"},
    "lion": {"exp_avg"},
    "muon": {"momentum_buffer", "exp_avg", "exp_avg_sq"},
    "lamb": {"exp_avg", "exp_avg_sq"},
    "adafactor": {"exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"},
}


def case(stage, optimizer=None):
    of = {} if optimizer is None else {"optimizer": {"kind": optimizer}}
    return {"stage": stage, "shard_all": stage == 3, **of}


def optimizer_of(case):
    return case.get("optimizer", {}).get("kind", "adamw")


def launch(folder, jobs, processes):
    """Does the jobs in one process group and returns what they noted."""
    results = folder / "results.jsonl"
    before = len(results.read_text().splitlines()) if results.exists() else 0
    program = partial(run_program, PROGRAM.read_text(), str(folder), json.dumps(jobs))
    codes = exit_codes_of([], processes, folder / "log", seconds=1800, before=program)
    assert codes == [0] * processes, (folder / "log").read_text()
    return [json.loads(line) for line in results.read_text().splitlines()[before:]]


def consolidated(path):
    """Every tensor of a checkpoint, whole, and the counters."""
    checkpoint = Checkpoint(open_store(str(Path(path).parent)), Path(path).name)
    manifest = checkpoint.read_manifest()
    assert manifest.gap() is None
    whole = {
        kind: [
            ParameterSlice(n, 0, torch.full((torch.Size(s).numel(),), torch.nan))
            for n, s in manifest.shapes_of(kind).items()
        ]
        for kind in sorted(manifest.kinds)
    }
    CheckpointReader(checkpoint, manifest).fill(whole)
    tensors = {(kind, part.name): part.values for kind, slices in whole.items() for part in slices}
    return tensors, {name: value for name, value in manifest.scalars.items() if name == "optimizer.step"}


def assert_equal(one, other, optimizer, where):
    (tensors, scalars), (expected, expected_scalars) = consolidated(one), consolidated(other)
    assert scalars == expected_scalars, where
    assert tensors.keys() == expected.keys(), where
    assert {kind for kind, _ in tensors} == {"weight", "ema", *KINDS.get(optimizer, ("exp_avg", "exp_avg_sq"))}
    for key, values in tensors.items():
        assert torch.equal(values, expected[key]), f"{key} {where}"  # to the bit, and without NaN


def check_reads(results, written):
    for result in results:
        source = written[result["read"]]
        where = f"{result['read']} read by {result['world']} process(es) at {result['case']}"
        optimizer = optimizer_of(source["case"])
        assert_equal(result["saved"], source["saved"], optimizer, where)
        low = "precision" in result["case"] or "precision" in source["case"]
        tolerance = 0.02 if low else 1e-4 if optimizer in ROUNDING else 1e-6
        assert result["losses"] == pytest.approx(source["losses"], abs=tolerance), where


def test_three_processes_at_other_stages_read_what_two_wrote(tmp_path):
    fp32 = {f"fp32-{stage}": case(stage) for stage in STAGES}
    jobs = [{"write": name, "case": how} for name, how in (fp32 | OTHERS).items()]
    written = {result["write"]: result for result in launch(tmp_path, jobs, 2)}
    jobs = [{"read": f"fp32-{stage}", "case": case((stage + 1) % 4)} for stage in STAGES]
    jobs += [
        {"read": "bf16-0", "case": OTHERS["offload-3"]},
        {"read": "bf16-1", "case": OTHERS["bf16-0"]},
        {"read": "offload-3", "case": OTHERS["bf16-1"]},
        {"read": "muon-2", "case": case(3, "muon")},
        {"read": "adafactor-1", "case": case(0, "adafactor")},
    ]
    check_reads(launch(tmp_path, jobs, 3), written)


@pytest.mark.skipif(not ALL, reason="FASTVIT_TEST_RESUMES=all resumes in all ways")
@pytest.mark.timeout(3600)
def test_every_world_size_and_stage_reads_every_other(tmp_path):
    written = {}
    for world in (1, 2, 3, 4):
        jobs = [{"write": f"w{world}-{stage}", "case": case(stage)} for stage in STAGES]
        written |= {result["write"]: result for result in launch(tmp_path, jobs, world)}
    for world in (1, 2, 3, 4):
        check_reads(
            launch(tmp_path, [{"read": n, "case": case(s)} for n, s in product(written, STAGES)], world), written
        )


@pytest.mark.skipif(not ALL, reason="FASTVIT_TEST_RESUMES=all resumes in all ways")
@pytest.mark.timeout(3600)
def test_every_precision_and_offload_reads_every_other(tmp_path):
    cases = OTHERS | MORE_OTHERS | {f"fp32-{stage}": case(stage) for stage in STAGES}
    cases = {name: how for name, how in cases.items() if optimizer_of(how) == "adamw"}
    jobs = [{"write": name, "case": how} for name, how in cases.items()]
    written = {result["write"]: result for result in launch(tmp_path, jobs, 2)}
    for world in (2, 3):
        jobs = [{"read": name, "case": how} for name, how in product(written, cases.values())]
        check_reads(launch(tmp_path, jobs, world), written)


@pytest.mark.skipif(not ALL, reason="FASTVIT_TEST_RESUMES=all resumes in all ways")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("optimizer", KINDS)
def test_every_optimizer_computes_the_same_at_every_stage_and_reads_every_other(tmp_path, optimizer):
    ways = {f"w{world}-{stage}": (world, stage) for world in (1, 2) for stage in STAGES}
    written = {}
    for name, (world, stage) in ways.items():
        (written[name],) = launch(tmp_path, [{"write": name, "case": case(stage, optimizer)}], world)
    for name, result in written.items():
        tolerance = 1e-4 if optimizer in ROUNDING else 1e-5
        assert result["losses"] == pytest.approx(written["w1-0"]["losses"], abs=tolerance), name
    for world in (1, 2, 3):
        jobs = [{"read": name, "case": case(stage, optimizer)} for name, stage in product(written, STAGES)]
        check_reads(launch(tmp_path, jobs, world), written)
    for name, (world, stage) in ways.items():
        (resumed,) = launch(tmp_path, [{"read": name, "case": case(stage, optimizer)}], world)
        assert resumed["losses"] == written[name]["losses"], name  # to the bit


@pytest.mark.skipif(not ALL, reason="FASTVIT_TEST_RESUMES=all resumes in all ways")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_same_world_size_and_stage_goes_on_to_the_bit(tmp_path, world):
    """Each in processes of its own: engines that one process had before change the last bit of sums."""
    for stage in STAGES:
        (uninterrupted,) = launch(tmp_path, [{"write": str(stage), "case": case(stage)}], world)
        (resumed,) = launch(tmp_path, [{"read": str(stage), "case": case(stage)}], world)
        assert resumed["losses"] == uninterrupted["losses"], f"ZeRO-{stage}"
