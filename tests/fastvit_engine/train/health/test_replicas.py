import re

import pytest
import torch
from torch import nn

from fastvit_engine.errors import UserError
from fastvit_engine.train.health.replicas import Replicas, check_first_weights
from tests.fastvit_engine.plain_engine import PlainEngine
from tests.fastvit_engine.ranks import on_ranks


def network(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30), nn.Linear(30, 5)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def compare(size, change=lambda rank, model: None, dtype=torch.float32):
    """What the comparison finds where `change` has been made to the copy of each rank."""

    def of_rank(world):
        model = network(dtype)
        with torch.no_grad():
            change(world.rank, model)
        return Replicas(PlainEngine(model), world).compare()

    verdicts = on_ranks(size, of_rank)
    assert all(verdict == verdicts[0] for verdict in verdicts)
    return verdicts[0]


def flip(bit, element=17):
    def change(rank, model):
        if rank == 1:
            model[0].weight.data.view(-1).view(torch.int32)[element] ^= 1 << bit

    return change


def test_equal_copies_are_well():
    assert compare(3) is None


@pytest.mark.parametrize("bit", [0, 7, 22])
def test_the_minority_with_one_flipped_bit_is_named(bit):
    verdict = compare(3, flip(bit))
    assert (verdict.kind, verdict.ranks) == ("replicas", (1,))


def test_two_that_differ_are_both_named():
    verdict = compare(2, flip(3))
    assert verdict.ranks == (0, 1)
    assert "no majority" in verdict.message


def test_half_of_the_bits_of_a_bf16_element():
    def change(rank, model):
        if rank == 2:
            model[2].weight.data.view(-1).view(torch.int16)[-1] ^= 1

    assert compare(4, change, torch.bfloat16).ranks == (2,)


def test_an_exchange_of_two_elements_is_seen():
    def change(rank, model):
        if rank == 0:
            weight = model[2].weight.data.view(-1)
            weight[[3, 90]] = weight[[90, 3]]

    assert compare(3, change).ranks == (0,)


def test_the_sign_of_zero_and_buffers_count():
    def zeros(rank, model):
        model[0].bias.fill_(-0.0 if rank == 0 else 0.0)

    def mean(rank, model):
        model[1].running_mean[4] = rank == 2

    assert compare(3, zeros).ranks == (0,)
    assert compare(3, mean).ranks == (2,)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(value):
    def change(rank, model):
        if rank == 2:
            model[2].bias[1] = value

    verdict = compare(3, change)
    assert (verdict.kind, verdict.ranks, verdict.parameters) == ("weights", (2,), ("2.bias",))


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ((0, 1), r"before any update, weights are not finite \(0.bias, 2.weight\): correct model.head_bias"),
        ((1,), r"before any update, weights are not finite \(0.bias, 2.weight\) on rank 1 only: leave out the host"),
    ],
)
def test_first_weights_that_are_not_finite_are_refused_on_every_process(ranks, message):
    def refusal(world):
        model = network()
        if world.rank in ranks:
            model[0].bias.data[0] = float("nan")
            model[2].weight.data[0] = float("inf")
        try:
            check_first_weights(PlainEngine(model), world)
        except UserError as error:
            return str(error)
        return None

    found = on_ranks(2, refusal)
    assert found[0] == found[1] and re.match(message, found[0])


def test_first_weights_that_are_finite_pass():
    assert on_ranks(2, lambda world: check_first_weights(PlainEngine(network()), world)) == [None, None]
