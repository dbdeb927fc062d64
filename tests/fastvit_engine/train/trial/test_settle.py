"""Which micro-batch a run has: what it had, what was found before, or what a trial finds."""

import json
from dataclasses import replace

import pytest
import torch

from fastvit_engine.config import Config
from fastvit_engine.errors import UserError
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.sizing.defaults import choose
from fastvit_engine.sizing.machine import Machine
from fastvit_engine.train.trial.settle import settle_micro_batch

GPUS = Machine(2, 2, 80 * 2**30, on_gpu=True, cores=8)


def chosen_for(machine=GPUS, batch=256, ema=None, augment=None, stage=1, **train):
    sections = {
        "ema": {"decay": ema},
        "augment": augment or {},
        "model": {"name": "B/16", "image_size": 224, "num_classes": 10},
        "train": {"global_batch_size": batch, "micro_batch_trial": True, "memory_gib": 4, **train},
        "zero": {"stage": stage},
    }
    return choose(Config.model_validate(sections), machine)


class Alone:
    """One process, which has no GPU to be asked."""

    rank, size, is_main = 0, 2, True

    device = torch.device("cpu")

    def on_main(self, function):
        return function()


@pytest.fixture
def settle(tmp_path):
    """settle(chosen, limit) -> the micro-batch, what is said, and what was tried

    limit: images that fit. free: GiB that a trial may take.
    """

    def start(chosen, limit, *, free=70.5, own_objective=False, continues=False):
        tried = []

        def peak_of(size):
            tried.append(size)
            return 2**30 * size if size <= limit else None

        run = RunFolder(tmp_path / "run")
        settled, message = settle_micro_batch(
            chosen,
            run,
            Alone(),
            tmp_path / "cache",
            peak_of,
            int(free * 2**30),
            own_objective=own_objective,
            continues=continues,
        )
        return settled, message, tried

    return start


def reason_of(chosen):
    return next(choice.reason for choice in chosen.choices if choice.key == "train.micro_batch_size")


def test_a_trial_begins_with_what_is_computed_and_is_remembered(settle, tmp_path):
    chosen = chosen_for()
    computed = chosen.config.train.micro_batch_size
    assert 1 < computed < 128
    settled, message, tried = settle(chosen, limit=2 * computed)
    assert tried[0] == computed and settled.config.train.micro_batch_size == 2 * computed
    assert settled.memory.total > chosen.memory.total
    assert reason_of(settled) == f"the largest that fits, by trial; {128 // (2 * computed)} per step"
    (file,) = (tmp_path / "cache").iterdir()
    assert f"{computed} fits ({computed}.0 GiB)" in message and str(file) in message

    again, message, tried = settle(chosen, limit=1)
    assert again.config == settled.config and tried == []
    assert message == f"micro-batch of an earlier trial: to try again, delete {file}"
    file.unlink()
    assert settle(chosen, limit=1)[0].config.train.micro_batch_size == 1


def test_what_cannot_be_remembered_is_tried_again(settle, tmp_path):
    (tmp_path / "cache").write_text("")  # no folder
    for _ in range(2):
        settled, message, tried = settle(chosen_for(), limit=16)
        assert settled.config.train.micro_batch_size == 16 and tried and "delete" not in message


@pytest.mark.parametrize(
    "other",
    [
        {"precision": "fp32"},
        {"batch": 512},
        {"recompute": "all"},
        {"activation_checkpointing": 3},
        {"memory_gib": 5},
        {"ema": 0.9},
        {"augment": {"randaugment_ops": 2}},
        {"machine": replace(GPUS, processes=4, processes_per_node=4)},
        {"machine": replace(GPUS, memory=40 * 2**30)},
    ],
)
def test_another_job_is_tried_for_itself(settle, other):
    settle(chosen_for(), limit=16)
    assert settle(chosen_for(**other), limit=16)[2]


@pytest.mark.parametrize("variable", ["FASTVIT_KERNELS", "FASTVIT_TUNING", "PYTORCH_CUDA_ALLOC_CONF"])
def test_so_is_one_with_another_variable(settle, monkeypatch, variable):
    settle(chosen_for(), limit=16)
    monkeypatch.setenv(variable, "other")
    assert settle(chosen_for(), limit=16)[2]


def test_so_is_one_with_another_gib_of_free_memory(settle):
    settle(chosen_for(), limit=16, free=70.5)
    assert settle(chosen_for(), limit=16, free=70.9)[2] == []
    assert settle(chosen_for(), limit=16, free=60.5)[2]


def test_of_an_objective_of_ones_own_nothing_is_remembered(settle, tmp_path):
    for _ in range(2):
        settled, message, tried = settle(chosen_for(), limit=16, own_objective=True)
        assert tried and settled.record()["tried_as"] is None and not (tmp_path / "cache").exists()
        assert message.endswith("; not remembered, as memory depends on the code of your objective")


def test_what_needs_no_other_memory_is_the_same_job(settle):
    settle(chosen_for(), limit=16)
    assert settle(chosen_for(duration="3 epochs", log_every=7), limit=16)[2] == []


@pytest.fixture
def record(tmp_path):
    """record(defaults): what the start of a run writes down"""

    def write(defaults):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "environment.json").write_text(json.dumps({"defaults": defaults}))

    return write


def test_a_run_that_continues_keeps_its_micro_batch_whatever_is_free_or_remembered(settle, record):
    record(settle(chosen_for(), limit=8)[0].record())
    settle(chosen_for(), limit=32, free=40)
    for free in (70, 40):
        settled, message, tried = settle(chosen_for(), limit=32, free=free, continues=True)
        assert settled.config.train.micro_batch_size == 8 and message == "" and tried == []
    record(settled.record())
    assert settle(chosen_for(), limit=32, continues=True)[0] == settled


@pytest.mark.parametrize("other", [{"precision": "fp32"}, {"ema": 0.9}, {"recompute": "all"}, {"batch": 512}])
def test_it_tries_again_if_its_steps_need_other_memory(settle, record, other):
    record(settle(chosen_for(), limit=8)[0].record())
    settled, message, tried = settle(chosen_for(**other), limit=4, continues=True)
    assert settled.config.train.micro_batch_size == 4 and tried
    assert message.startswith("this run has no micro-batch of a trial with these settings, versions and GPUs; tried")


def test_it_tries_if_no_trial_found_what_it_had(settle, record):
    """As of a start that was given one, and of a record from before trials were recorded."""
    given = chosen_for(micro_batch_size=2, micro_batch_trial=False)
    record(given.record())
    assert settle(chosen_for(), limit=8, continues=True)[0].config.train.micro_batch_size == 8
    older = given.record()
    del older["tried_as"]
    record(older)
    assert settle(chosen_for(), limit=8, continues=True)[0].config.train.micro_batch_size == 8


def test_a_model_that_does_not_fit_is_said_with_what_helps(settle):
    with pytest.raises(
        UserError, match="no micro-batch that fits the GPUs, not even of 1 image, the fewest at zero.st"
    ):
        settle(chosen_for(), limit=0)


@pytest.mark.parametrize(("stage", "remedy"), [(2, "raise zero.stage"), (3, "use more GPUs")])
def test_the_remedy_is_one_that_is_left(settle, stage, remedy):
    with pytest.raises(UserError) as error:
        settle(chosen_for(stage=stage), limit=0)
    assert remedy in str(error.value) and ("raise zero.stage" in str(error.value)) == (stage < 3)
    assert "activation_checkpointing=all" in str(error.value)
    with pytest.raises(UserError) as error:
        settle(chosen_for(stage=stage, activation_checkpointing="all"), limit=0)
    assert "activation_checkpointing=all" not in str(error.value)


def test_a_batch_that_is_not_divided_stays_so_where_16_bits_would_be_added(settle):
    sections = {
        "model": {"name": "Ti/16", "image_size": 32, "num_classes": 10},
        "train": {"global_batch_size": 8, "micro_batch_trial": True},
    }
    chosen = choose(Config.model_validate(sections), GPUS)
    assert chosen.config.zero.stage == 0 and settle(chosen, limit=4)[2] == [4]
