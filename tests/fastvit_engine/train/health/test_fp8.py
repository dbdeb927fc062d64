"""When a layer leaves FP8: after steps in a row, alike on all processes, and as before after a resume."""

import pytest
import torch

from fastvit_engine.checkpoint.trainer_state import Fp8State
from fastvit_engine.config import load_config
from fastvit_engine.models import build_for_training
from fastvit_engine.models.fp8 import Fp8Layers
from fastvit_engine.train.health.fp8 import Fp8Fallback
from tests.fastvit_engine.ranks import on_ranks
from tests.fastvit_engine.train.health.test_guard import guarded

NONE = [0.0] * 16
FIRST, SECOND = [1.0] + [0.0] * 15, [0.0, 2.0] + [0.0] * 14  # blocks.0.qkv; blocks.0.proj, on two processes


@pytest.fixture
def layers():
    config = load_config("quickstart", ["train.precision=fp8", "train.fp8.emulate=true"]).config
    return Fp8Layers(build_for_training(config), config, torch.device("cpu"))


def test_only_steps_in_a_row_count(layers):
    fallback = Fp8Fallback(layers, after=3)
    seen = [fallback.step_done(step) for step in (FIRST, FIRST, NONE, FIRST, FIRST, FIRST, FIRST)]
    assert seen == [(), (), (), (), (), ("blocks.0.qkv",), ()]
    assert fallback.state == Fp8State(("blocks.0.qkv",), {})


def test_layers_count_for_themselves(layers):
    fallback = Fp8Fallback(layers, after=2)
    both = [a + b for a, b in zip(FIRST, SECOND, strict=True)]
    assert [fallback.step_done(step) for step in (FIRST, both, SECOND)] == [(), ("blocks.0.qkv",), ("blocks.0.proj",)]
    assert fallback.state.fallen == ("blocks.0.qkv", "blocks.0.proj")


def test_without_a_limit_none_leaves(layers):
    fallback = Fp8Fallback(layers, after=None)
    assert all(fallback.step_done(FIRST) == () for _ in range(50))


def test_what_is_restored_continues_as_if_nothing_had_happened(layers):
    before = Fp8Fallback(layers, after=3)
    for step in (SECOND, SECOND, SECOND, FIRST, FIRST):
        before.step_done(step)
    after = Fp8Fallback(layers, after=3)
    after.restore(Fp8State.from_json(before.state.to_json()))
    assert after.state == before.state == Fp8State(("blocks.0.proj",), {"blocks.0.qkv": 2})
    assert after.step_done(FIRST) == before.step_done(FIRST) == ("blocks.0.qkv",)
    after.restore(Fp8State())  # the run has gone back to where all were in FP8
    assert after.step_done(FIRST) == ()


def test_a_model_that_has_other_layers_in_fp8_forgets_those_of_before(layers):
    fallback = Fp8Fallback(layers, after=3)
    fallback.restore(Fp8State(("blocks.9.qkv",), {"blocks.0.head": 2}))
    assert fallback.state == Fp8State()


def test_the_sentence_names_layers_and_step(layers):
    fallback = Fp8Fallback(layers, after=1)
    assert fallback.describe(fallback.step_done(FIRST), 12) == (
        "blocks.0.qkv leaves FP8 after step 12 and continues in bf16: scales were out of range in 1 step in a row "
        "(15 of 16 layers stay in FP8)"
    )


def test_all_processes_read_the_same_counts():
    def of_rank(world):
        guard, step = guarded(world)
        guard.count = lambda: torch.tensor([float(world.rank), 0.0, 1.0], dtype=torch.float64)
        return step(1.0)[0], step(float("nan"))[0]

    for healthy, ill in on_ranks(3, of_rank):
        assert healthy.counts == ill.counts == (3.0, 0.0, 3.0)
        assert healthy.anomaly is None and ill.anomaly is not None
