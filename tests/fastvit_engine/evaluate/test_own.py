"""Evaluators that are given to `train`: how they are called, and what they must be."""

import numpy as np
import pytest
import torch

from fastvit_engine.errors import UserError
from fastvit_engine.evaluate.own import Own, check_evaluators


@pytest.mark.parametrize("training", [True, False])
def test_a_function_gets_the_model_in_evaluation_mode_and_without_gradients(training):
    seen = []

    def measure(model):
        seen.append((model.training, torch.is_grad_enabled()))
        return {"a": 1, "b": np.float32(0.5), "c": torch.tensor(float("nan"))}

    model = torch.nn.Linear(1, 1).train(training)
    (row,) = Own("mine", measure, every_steps=5).run(model, step=7, name="mine_ema")
    assert seen == [(False, False)] and model.training == training
    assert (row["step"], row["eval"]) == (7, "mine_ema")
    assert row["figures"] == pytest.approx({"a": 1.0, "b": 0.5, "c": float("nan")}, nan_ok=True)
    assert {type(number) for number in row["figures"].values()} == {float}


@pytest.mark.parametrize("returned", [None, 0.5, {}, {"a": "x"}, {1: 0.5}, {"a": torch.zeros(2)}])
def test_what_is_no_numbers_by_name_is_refused(returned):
    with pytest.raises(UserError, match="the evaluator mine has returned .*: return numbers by name, such as"):
        Own("mine", lambda model: returned, every_steps=5).run(torch.nn.Linear(1, 1), step=1, name="mine")


@pytest.mark.parametrize("name", ["", "a b", "a/b", "eval", "fewshot", "train", "mine_ema", 3])
def test_names_that_other_rows_have_are_refused(name):
    with pytest.raises(UserError, match="name an evaluator by letters, digits and _"):
        check_evaluators({name: len})


def test_an_evaluator_is_a_function():
    check_evaluators({"mine": len, "other_2": lambda model: {}})
    with pytest.raises(UserError, match="evaluators has 3 as mine: give a function of the model"):
        check_evaluators({"mine": 3})
