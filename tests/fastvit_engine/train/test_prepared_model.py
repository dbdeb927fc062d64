"""What becomes of a model follows the configuration."""

import pytest
import torch

from fastvit_engine.config import Config
from fastvit_engine.models import build_for_training
from fastvit_engine.train.prepared_model import prepare_model

CPU = torch.device("cpu")
SMALL = {"name": "Ti/16", "image_size": 32, "num_classes": 3, "depth": 2}


@pytest.mark.parametrize(("given", "used"), [("auto", "gelu"), ("none", "none"), ("all", "all")])
def test_blocks_recompute_what_was_chosen(given, used):
    config = Config.model_validate({"model": SMALL, "train": {"recompute": given}})
    model = build_for_training(config)
    assert prepare_model(model, config, CPU) is None
    assert [block.recompute for block in model.blocks] == [used, used]
