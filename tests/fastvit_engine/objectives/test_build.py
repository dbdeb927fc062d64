import torch

from fastvit_engine.config import Config
from fastvit_engine.config.sections import TrainConfig
from fastvit_engine.objectives import build_objective
from fastvit_engine.objectives.build import OBJECTIVES
from fastvit_engine.objectives.classify import Classify


def test_every_objective_of_the_configuration_can_be_built():
    names = TrainConfig.model_fields["objective"].annotation.__args__
    assert set(names) == set(OBJECTIVES)
    for name in names:
        config = Config.model_validate({"train": {"objective": name}})
        assert callable(build_objective(config, torch.device("cpu")).losses)


def test_classification_is_the_default():
    assert type(build_objective(Config(), torch.device("cpu"))) is Classify
