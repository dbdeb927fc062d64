"""A try computes what a step of training does, on the model and the engine of the run."""

import pytest
import torch
import torch.nn.functional as F

from fastvit_engine.config import Config
from fastvit_engine.config.phases import Phase
from fastvit_engine.engine import deepspeed
from fastvit_engine.errors import UserError
from fastvit_engine.objectives import build_objective, find_objective
from fastvit_engine.sizing.defaults import choose
from fastvit_engine.sizing.machine import Machine
from fastvit_engine.train.trial import step
from fastvit_engine.train.trial.search import largest_that_fits, search
from fastvit_engine.train.trial.step import StepTrial

MODEL = {"name": "Ti/4", "image_size": 8, "width": 32, "depth": 2, "heads": 2, "num_classes": 10}
CPU = Machine(1, 1, 2**34, on_gpu=False, cores=1)


def trial_of(world, stage=1, objective="classify", **more):
    train = {"precision": "fp32", "global_batch_size": 16, "objective": objective}
    config = Config.model_validate({"model": MODEL, "train": train, "zero": {"stage": stage}, **more})
    phase = Phase(0, config.model.image_size, 0.0)
    return StepTrial(choose(config, CPU).config, CPU, world, find_objective(objective), phase)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_is_taken_twice_with_the_optimizers_state(lone_world, monkeypatch, stage):
    engines, updates = [], []

    def build(*given, **named):
        built = real(*given, **named)
        engines.append(built.engine)
        built.engine.approve_updates(lambda norm: updates.append(float(norm)) is None)
        return built

    real = step.build
    monkeypatch.setattr(step, "build", build)
    assert trial_of(lone_world, stage, ema={"decay": 0.9}).peak_of(4) == 0  # a CPU's memory is not measured
    assert len(engines) == 1 and len(updates) >= 2 and all(norm > 0 for norm in updates)


@pytest.mark.parametrize("objective", ["mae", "masked_patch"])
def test_every_objective_without_a_teacher_can_be_tried(lone_world, objective):
    assert trial_of(lone_world, objective=objective).peak_of(2) == 0


@pytest.mark.parametrize("stage", [1, 3])
def test_after_a_try_that_ran_out_of_memory_the_next_one_works(lone_world, monkeypatch, stage):
    """The memory is that of this fake limit, met in the middle of a step of the real engine."""

    class Limited:
        def __init__(self, objective):
            self.objective = objective

        def losses(self, model, batch):
            losses = self.objective.losses(model, batch)
            if len(losses) > 4:
                raise torch.OutOfMemoryError("no more than four images")
            return losses

    monkeypatch.setattr(step, "build_objective", lambda *given: Limited(build_objective(*given)))
    tried = search([1, 2, 4, 8, 16], 8, trial_of(lone_world, stage).peak_of)
    assert [(each.micro_batch_size, each.peak_bytes) for each in tried] == [(8, None), (2, 0), (4, 0)]
    assert largest_that_fits(tried).micro_batch_size == 4


def test_memory_that_ends_while_the_engine_is_built_leaves_pytorch_as_it_was(lone_world, monkeypatch):
    """ZeRO-3 exchanges functions of PyTorch, and an engine that did not come about cannot be closed."""

    linear, exchanged = F.linear, []

    def run_out_of_memory(engine):
        exchanged.append(F.linear is not linear)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(deepspeed, "layout_of", run_out_of_memory)
    assert trial_of(lone_world, stage=3).peak_of(4) is None
    assert exchanged == [True] and F.linear is linear


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False),
    ],
)
def test_libraries_say_in_words_that_memory_is_short(lone_world, monkeypatch, error, short):
    def run_steps(self, micro_batch_size):
        raise error

    monkeypatch.setattr(StepTrial, "run_steps", run_steps)
    trial = trial_of(lone_world)
    if short:
        assert trial.peak_of(4) is None
        return
    with pytest.raises(RuntimeError) as raised:
        trial.peak_of(4)
    assert raised.value is error


def test_a_teacher_is_not_there(lone_world):
    more = {"ema": {"decay": 0.9}, "augment": {"mixup": 0, "cutmix": 0}}
    with pytest.raises(UserError, match="dino learns from a teacher"):
        trial_of(lone_world, objective="dino", dino={"local_views": 0}, **more).run_steps(4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_that_has_too_little_memory_is_found_out_and_is_free_again(lone_world):
    trial = trial_of(lone_world)
    assert trial.peak_of(4) > 0
    before = torch.cuda.memory_allocated()  # with the workspaces of libraries, which stay
    too_much = 2**24  # images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "_MARGIN", 0.9)  # other programs may use the GPU, too
        assert trial.peak_of(too_much) is None
    assert torch.cuda.memory_allocated() == before
