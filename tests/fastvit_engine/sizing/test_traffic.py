import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from fastvit_engine.config import Config, load_config
from fastvit_engine.data.stream.batch_split import split_batch
from fastvit_engine.sizing.defaults import choose
from fastvit_engine.sizing.machine import Machine
from fastvit_engine.sizing.traffic import Await, Compute, Send, Settings, step_events
from tests.fastvit_engine.warm_rank import run_program
from tests.fastvit_engine.warm_ranks import exit_codes_of
from tests.in_full import IN_FULL

CHOSEN = {  # as the engine chooses limits for this model: in blocks
    "stage3_prefetch_bucket_size": 900_000,
    "stage3_max_live_parameters": 1_800_000,
    "stage3_max_reuse_distance": 900_000,
}
CASES = [  # stage, precision, passes, processes, DeepSpeed's settings, and what is frozen, if anything is
    (0, "bf16", 1, 2, {}),
    (1, "bf16", 2, 2, {}),
    (1, "fp32", 2, 2, {"reduce_bucket_size": 50_000}),
    (2, "bf16", 2, 2, {"reduce_bucket_size": 500_000}),
    (3, "bf16", 2, 2, {"reduce_bucket_size": 500_000, **CHOSEN}),
    (3, "bf16", 1, 2, {"reduce_bucket_size": 500_000, **CHOSEN}),
    (3, "fp32", 2, 2, {"reduce_bucket_size": 50_000}, "backbone"),
]
MORE = [
    (0, "fp32", 2, 2, {}),
    (2, "fp32", 1, 2, {}, "backbone"),
    (3, "fp32", 1, 2, {}, "backbone"),
    (1, "fp32", 1, 2, {"overlap_comm": True, "reduce_bucket_size": 500_000}),
    (2, "fp32", 1, 2, {"reduce_bucket_size": 50_000}),
    (3, "fp32", 1, 2, {"reduce_bucket_size": 50_000}),
    (3, "bf16", 2, 2, {"reduce_bucket_size": 500_000, **CHOSEN, "stage3_param_persistence_threshold": 0}),
    (3, "fp32", 1, 2, {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0}),
    (3, "bf16", 3, 2, {"stage3_prefetch_bucket_size": 200_000, "stage3_max_reuse_distance": 0}),
    (2, "bf16", 2, 3, {"reduce_bucket_size": 500_000}),
    (3, "bf16", 2, 3, {"reduce_bucket_size": 500_000, **CHOSEN}),
    (3, "bf16", 2, 4, {"reduce_bucket_size": 500_000, **CHOSEN, "zero_hpz_partition_size": 2}),
]


def config_of(stage, precision, zero, frozen="none"):
    zero = {"overlap_comm": False, **zero}
    return {
        "model": {"name": "Ti/16", "image_size": 32, "num_classes": 10, "depth": 6},
        "train": {"precision": precision},
        "zero": {"stage": stage},
        "optimizer": {"frozen": frozen},
        "deepspeed": {"zero_optimization": zero},
    }


def events_of(config, processes, passes, per_node=1):
    return step_events(config, Settings.of(config, processes, per_node, passes))


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 3, 4] if IN_FULL else [2])
def test_messages_are_those_that_deepspeed_issues(tmp_path, processes):
    """Each collective operation of one step, by kind, and the bytes of each kind: to a percent, for padding."""
    cases = [case for case in ([*CASES, *MORE] if IN_FULL else CASES) if case[3] == processes]
    orders = [{"config": config_of(stage, p, *more), "passes": passes} for stage, p, passes, _, *more in cases]
    program, log = Path(__file__).with_name("issued_messages.py").read_text(), tmp_path / "log"
    run = partial(run_program, program, json.dumps(orders))
    assert exit_codes_of([], processes, log, before=run) == [0] * processes, log.read_text()
    lines = [line.removeprefix("issued ") for line in log.read_text().splitlines() if line.startswith("issued ")]
    for (stage, precision, passes, _, zero, *frozen), line in zip(cases, lines, strict=True):
        config = Config.model_validate(config_of(stage, precision, zero, *frozen))
        events = events_of(config, processes, passes, per_node=zero.get("zero_hpz_partition_size", 1))
        said = [event.message for event in events if isinstance(event, Send)][:-1]  # the loss is the engine's
        issued = [(kind, size) for kind, size in json.loads(line) if kind != "broadcast"]
        where = (stage, precision, passes, zero, frozen)
        assert Counter(message.kind for message in said) == Counter(kind for kind, _ in issued), where
        for kind in ("all_reduce", "all_gather", "reduce_scatter"):
            expected = sum(size for of, size in issued if of == kind)
            assert sum(message.bytes for message in said if message.kind == kind) == pytest.approx(expected, rel=0.01)


def shares(events):
    """Of forward and backward passes."""
    return [
        sum(e.share for e in events if isinstance(e, Compute) and e.forward == forward) for forward in (True, False)
    ]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("processes", "per_node"), [(1, 1), (8, 8), (64, 8)])
@pytest.mark.parametrize("recipe", ["vit_h14_jft", "mae_h14", "probe"])
def test_a_step_computes_all_of_its_passes(stage, processes, per_node, recipe):
    batch = ["train.global_batch_size=4096", f"zero.stage={stage}"]
    settings = [*batch, "model.name=B/16", "model.num_classes=10"] if recipe == "probe" else batch
    config = load_config(recipe, settings).config
    machine = Machine(processes, per_node, 80 * 2**30, on_gpu=True)
    chosen = choose(config, machine).config
    steps = split_batch(chosen, processes).accumulation_steps
    events = events_of(chosen, processes, steps, per_node)
    assert shares(events) == pytest.approx([steps, steps])
    sent = 0
    for event in events:  # nobody waits for what was never sent
        sent += isinstance(event, Send)
        assert not isinstance(event, Await) or event.message < sent
    assert (sent > 0) == (processes > 1)


def test_copies_within_nodes_keep_gathers_off_the_network():
    def bytes_between(*settings):
        config = load_config("vit_h14_jft", ["zero.stage=3", *settings]).config
        chosen = choose(config, Machine(64, 8, 80 * 2**30, on_gpu=True)).config
        sent = [event.message for event in events_of(chosen, 64, 1, 8) if isinstance(event, Send)]
        return sum(m.bytes for m in sent if m.kind == "all_gather" and not m.within_node)

    whole = bytes_between("deepspeed.zero_optimization.zero_hpz_partition_size=1")
    assert bytes_between() < 0.6 * whole  # which are gathered for the forward pass alone


def test_reductions_hide_behind_the_backward_pass_only_if_they_overlap():
    def events(overlaps):
        settings = ["zero.stage=2", f"deepspeed.zero_optimization.overlap_comm={overlaps}"]
        chosen = choose(load_config("vit_l16_jft", settings).config, Machine(8, 8, 80 * 2**30, on_gpu=True)).config
        return events_of(chosen, 8, 1, 8)

    assert any(not e.waits for e in events("true") if isinstance(e, Send))
    assert all(e.waits for e in events("false") if isinstance(e, Send))
