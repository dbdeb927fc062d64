"""What a job is built of follows the configuration."""

from types import SimpleNamespace

import pytest

from fastvit_engine.config import Config
from fastvit_engine.train import built


class Built(Exception):
    """Ends `build` at the engine, with the model that it was given."""


@pytest.mark.parametrize(("given", "used"), [("auto", "gelu"), ("none", "none"), ("all", "all")])
def test_blocks_recompute_what_was_chosen(given, used, monkeypatch):
    def build_engine(model, *others):
        raise Built(model)

    monkeypatch.setattr(built, "build_engine", build_engine)
    small = {"name": "Ti/16", "image_size": 32, "num_classes": 3, "depth": 2}
    config = Config.model_validate({"model": small, "train": {"recompute": given, "micro_batch_size": 1}})
    with pytest.raises(Built) as ended:
        built.build(config, None, SimpleNamespace(size=1))
    model = ended.value.args[0]
    assert [block.recompute for block in model.blocks] == [used, used]
