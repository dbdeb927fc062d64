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


def chosen_for(machine=GPUS, batch=256, **train):
    sections = {
        "model": {"name": "B/16", "image_size": 224, "num_classes": 10},
        "train": {"global_batch_size": batch, "micro_batch_trial": True, "memory_gib": 4, **train},
        "zero": {"stage": 1},
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
    """settle(chosen, limit) -> the micro-batch, what is said, and what was tried"""

    def start(chosen, limit, *, continues=False):
        tried = []

        def peak_of(size):
            tried.append(size)
            return 2**30 * size if size <= limit else None

        run = RunFolder(tmp_path / "run")
        settled, message = settle_micro_batch(chosen, run, Alone(), tmp_path / "cache", peak_of, continues=continues)
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
        {"machine": replace(GPUS, processes=4, processes_per_node=4)},
        {"machine": replace(GPUS, memory=40 * 2**30)},
    ],
)
def test_another_job_is_tried_for_itself(settle, other):
    settle(chosen_for(), limit=16)
    assert settle(chosen_for(**other), limit=16)[2]


def test_what_needs_no_other_memory_is_the_same_job(settle):
    settle(chosen_for(), limit=16)
    assert settle(chosen_for(duration="3 epochs", log_every=7), limit=16)[2] == []


def test_a_run_that_continues_keeps_its_micro_batch(settle, tmp_path):
    """Whatever is remembered elsewhere; unless it has other processes or devices, or another batch."""
    chosen = chosen_for()
    settle(chosen, limit=32)
    started = {
        "world_size": 2,
        "device": "cpu",
        "defaults": {"choices": [{"key": "train.micro_batch_size", "value": 8}]},
    }
    (tmp_path / "run").mkdir()

    def size(**changes):
        (tmp_path / "run" / "environment.json").write_text(json.dumps({**started, **changes}))
        return settle(chosen, limit=32, continues=True)[0].config.train.micro_batch_size

    assert size() == 8
    assert size(world_size=3) == size(device="H200") == size(defaults={}) == 32
    assert size(defaults={"choices": [{"key": "train.micro_batch_size", "value": 7}]}) == 32  # does not divide 128
    assert settle(chosen, limit=32)[0].config.train.micro_batch_size == 32


def test_a_model_that_does_not_fit_is_said_with_what_helps(settle):
    with pytest.raises(
        UserError, match="no micro-batch that fits the GPUs, not even of 1 image, the fewest at zero.st"
    ):
        settle(chosen_for(), limit=0)


def test_a_batch_that_is_not_divided_stays_so_where_16_bits_would_be_added(settle):
    sections = {
        "model": {"name": "Ti/16", "image_size": 32, "num_classes": 10},
        "train": {"global_batch_size": 8, "micro_batch_trial": True},
    }
    chosen = choose(Config.model_validate(sections), GPUS)
    assert chosen.config.zero.stage == 0 and settle(chosen, limit=4)[2] == [4]
