from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastvit_engine.config import Config, load_config
from fastvit_engine.config.sections import OBJECTIVES as NAMES
from fastvit_engine.errors import UserError
from fastvit_engine.objectives import build_objective
from fastvit_engine.objectives.build import OBJECTIVES
from fastvit_engine.objectives.classify import Classify

CPU = torch.device("cpu")


def test_every_objective_of_the_engine_can_be_built():
    assert set(OBJECTIVES) == set(NAMES)
    for name in OBJECTIVES:
        config = Config.model_validate({"train": {"objective": name}})
        assert callable(build_objective(config, CPU).losses)


def test_classification_is_the_default():
    assert type(build_objective(Config(), CPU)) is Classify


class Own:
    def __init__(self, config, device):
        self.given = config, device

    def losses(self, model, batch):
        return model(batch.images)


def test_an_objective_of_ones_own_is_built_from_the_configuration_and_the_device():
    config = Config.model_validate({"train": {"objective": f"{__name__}:Own"}})
    for objective in (build_objective(config, CPU), build_objective(Config(), CPU, Own)):
        assert type(objective) is Own
        assert objective.given[0] in (config, Config()) and objective.given[1] == CPU


def test_an_objective_that_takes_other_arguments_is_refused():
    with pytest.raises(UserError, match=r"the objective classify takes \(config\), and .* \(too many positional arg"):
        build_objective(Config(), CPU, lambda config: Own(config, CPU))


def test_an_objective_without_losses_is_refused():
    with pytest.raises(UserError, match=r"the objective classify is .*, which has no method losses"):
        build_objective(Config(), CPU, lambda config, device: SimpleNamespace(losses=None))


@pytest.mark.parametrize("is_module", [False, True])
def test_parameters_that_nobody_would_train_are_refused(is_module):
    class Projected(nn.Module if is_module else object):
        def __init__(self, config, device):
            super().__init__()
            self.projection = nn.Linear(3, 2).requires_grad_(trained)

        def losses(self, model, batch):
            return self.projection(model(batch.images))

    trained = True
    with pytest.raises(UserError, match="has parameters of its own .* neither trained nor saved"):
        build_objective(Config(), CPU, Projected)
    trained = False  # as a teacher's are
    assert isinstance(build_objective(Config(), CPU, Projected), Projected)


NO_NAMES = ["clasify", "my_module:", ":Focal", "my-module:Focal", "a:b:c", "a.:b", "", "x.py:Focal()"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(
        UserError, match=r"train\.objective.*: write classify, dino, mae, masked_patch, moco, or MODULE:NAME"
    ):
        load_config("quickstart", {"train.objective": name})
