"""One optimizer step: what its gradient is, what comes before its update, and what is random about it."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fastvit_engine.config import Config
from fastvit_engine.data import Batch
from fastvit_engine.data.stream.batch_split import BatchSplit
from fastvit_engine.distributed.world import World
from fastvit_engine.errors import UserError
from fastvit_engine.train.step import hash_keys, seed_step, take_step
from fastvit_engine.train.step_times import StepTimes
from tests.fastvit_engine.plain_engine import PlainEngine

CPU = torch.device("cpu")
INPUTS = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))


class Engine(PlainEngine):
    """As DeepSpeed, it averages over the passes of a step; it updates nothing, and keeps the gradient."""

    def __init__(self, model, passes, happened):
        super().__init__(model)
        self.passes, self.happened = passes, happened

    def backward(self, loss):
        self.happened.append("backward")
        (loss / self.passes).backward()

    def step(self):
        self.happened.append("step")


class Rank:
    """One process of a job: takes a step on its share of INPUTS."""

    def __init__(self, split, rank, step=0, rehearsal=False, compare_every=None, objective=None):
        torch.manual_seed(0)
        self.happened, self.expected = [], []
        self.model = nn.Linear(4, 3)
        job = SimpleNamespace(
            config=Config.model_validate({"health": {"compare_replicas_every": compare_every}}),
            world=World(rank, split.world_size, CPU),
            split=split,
            engine=Engine(self.model, split.accumulation_steps, self.happened),
            objective=SimpleNamespace(losses=lambda model, batch: model(batch.images).square().sum(1) * batch.weights),
            checkpointer=SimpleNamespace(before_update=lambda: self.happened.append("saved")),
            copies=SimpleNamespace(before_update=lambda step: self.happened.append("copied")),
            health=SimpleNamespace(
                gradients=SimpleNamespace(on=False),
                replicas=SimpleNamespace(compare=lambda: "weights differ"),
                guard=SimpleNamespace(
                    expect=lambda loss, **found: self.expected.append((loss.item(), found)), report=lambda: "report"
                ),
            ),
            processes=SimpleNamespace(watchdog=SimpleNamespace(phase=lambda name: None)),
            times=StepTimes(CPU),
        )
        job.objective = objective or job.objective
        self.trace, self.report = take_step(job, step, micro_batches(split, rank), rehearsal=rehearsal)


def micro_batches(split, rank):
    own, start = split.positions(rank), 0
    for size in split.micro_batches(rank):
        at = own[start : start + size]
        start += size
        if size:
            yield Batch(INPUTS[at], torch.zeros(size), torch.ones(size), [str(n) for n in at], at)
        else:
            yield Batch(torch.ones(1, 4), torch.zeros(1), torch.zeros(1), [""], np.zeros(1))


@pytest.mark.parametrize(
    ("reduced", "said"),
    [
        (torch.mean, r"losses of shape \[\]"),
        (lambda losses: losses[:, None], r"losses of shape \[2, 1\]"),
        (lambda losses: 0.5, "a float"),
    ],
)
def test_an_objective_that_does_not_return_a_loss_for_each_sample_is_refused(reduced, said):
    objective = SimpleNamespace(losses=lambda model, batch: reduced(model(batch.images).square().sum(1)))
    with pytest.raises(UserError, match=f"the objective classify returned {said} for a micro-batch of 2: return a"):
        Rank(BatchSplit(8, 1, 4), 0, objective=objective)


@pytest.mark.parametrize(
    "split",
    [
        BatchSplit(8, 2, 2),
        BatchSplit(7, 3, 1),  # 3, 2 and 2 images
        BatchSplit(11, 2, 4),  # 6 images in passes of 2, 2, 1 and 1; 5 in 2, 1, 1 and 1
        BatchSplit(5, 4, 2),  # the last three ranks have a pass without an image
        BatchSplit(10, 3, 2, pairs=True),
    ],
)
def test_gradient_and_loss_are_the_mean_over_the_global_batch_however_it_is_divided(split):
    ranks = [Rank(split, rank) for rank in range(split.world_size)]
    model = ranks[0].model
    loss = model(INPUTS[: split.global_batch_size]).square().sum(1).mean()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for index, gradient in enumerate(expected):
        mean = torch.stack([list(rank.model.parameters())[index].grad for rank in ranks]).mean(0)
        torch.testing.assert_close(mean, gradient)
    assert np.mean([rank.expected[0][0] for rank in ranks]) == pytest.approx(loss.item())
    assert all(len(rank.expected) == 1 and rank.report == "report" for rank in ranks)
    keys = [key for rank in ranks for batch in rank.trace.batches for key in batch.keys if key]
    assert sorted(keys, key=int) == [str(number) for number in range(split.global_batch_size)]
    for rank in ranks:
        assert [len(losses) for losses in rank.trace.losses] == [len(batch.keys) for batch in rank.trace.batches]


def test_what_is_being_saved_is_copied_before_every_update():
    assert Rank(BatchSplit(4, 1, 2), 0).happened == ["backward", "saved", "copied", "step"] * 2


@pytest.mark.parametrize(
    ("step", "every", "compared"), [(9, 10, True), (8, 10, False), (10, 10, False), (9, None, False)]
)
def test_weights_are_compared_in_each_step_that_completes_the_interval_and_in_no_rehearsal(step, every, compared):
    for rehearsal in (False, True):
        ((_, found),) = Rank(BatchSplit(4, 1, 2), 0, step, rehearsal, every).expected
        assert found == {"fault": "weights differ" if compared and not rehearsal else None, "rehearsal": rehearsal}


def test_random_numbers_are_those_of_seed_step_and_rank():
    def drawn(seed, step, rank):
        seed_step(seed, step, World(rank, 3, CPU))
        return torch.rand(()).item()

    places = list(product(range(3), range(3), range(3)))
    numbers = [drawn(*place) for place in places]
    assert len(set(numbers)) == len(places)
    assert [drawn(*place) for place in places] == numbers


def test_the_hash_of_keys_does_not_depend_on_how_they_are_divided_and_counts_each_time():
    assert hash_keys(["a", "b", "c"]) == (hash_keys(["c"]) + hash_keys(["b", "", "a"])) % 2**64
    assert hash_keys(["a", "a"]) != hash_keys(["a"]) != hash_keys(["b"])
    assert hash_keys([""]) == 0
