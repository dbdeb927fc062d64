import re

import pytest

from fastvit_engine.config import Config
from fastvit_engine.config.checks import check_config
from fastvit_engine.config.packing import budgeted_images, check_squares
from fastvit_engine.errors import UserError


def config_of(**sections: object) -> Config:
    return Config.model_validate({"packing": {"max_patches": 196}, **sections})


def test_defaults_are_off_and_a_plain_model_is_accepted() -> None:
    assert not Config().packing.on
    check_config(Config())
    check_config(config_of())
    check_config(config_of(packing={"max_patches": 100, "min_patches": 100, "token_budget": 101}))
    check_squares(Config())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"packing": {"min_patches": 4}}, "packing.min_patches is 4, and there is no packing"),
        ({"packing": {"token_budget": 400}}, "packing.token_budget is 400, and there is no packing"),
        (
            {"packing": {"max_patches": 197}},
            "197, more than the 196 patches of a square image of model.image_size = 224",
        ),
        (
            {"packing": {"max_patches": 8, "min_patches": 9}},
            "packing.min_patches is 9, more than packing.max_patches = 8",
        ),
        ({"packing": {"max_patches": 8, "token_budget": 8}}, "one image may have 9 tokens"),
        (
            {"packing": {"max_patches": 8, "token_budget": 90}, "train": {"micro_batch_size": 4}},
            "packing.token_budget = 90 and train.micro_batch_size = 4 both say",
        ),
        ({"tokens": {"patch_drop": 0.5}}, "tokens.patch_drop = 0.5 is for squares"),
        ({"tokens": {"image_sizes": [[128, "50%"]]}}, "tokens.image_sizes = [(128, '50%')] is for squares"),
        ({"augment": {"mixup": 0.2}}, "augment.mixup mixes pairs of images pixel by pixel"),
        ({"augment": {"cutmix": 1.0}}, "augment.cutmix mixes pairs"),
        ({"model": {"drop_path": 0.1}}, "model.drop_path = 0.1 drops the branches of whole images"),
        ({"model": {"pool": "map"}}, "model.pool = map is not made for them"),
        ({"model": {"pos_embed": "relative"}}, "model.pos_embed = relative counts tokens between two patches"),
        ({"model": {"name": "R50+B/16"}}, "model.name = R50+B/16 has convolutions"),
        ({"model": {"name": "R50x1"}}, "model.name = R50x1 has convolutions"),
        ({"model": {"name": "Ti/3", "image_size": 224 // 3 * 3}}, "patches of 3 pixels"),
        ({"model": {"name": "timm/resnet18"}}, "which models of timm do not take (timm/resnet18)"),
        ({"train": {"objective": "mae"}, "model": {"num_classes": 0}}, "train.objective = mae takes squares"),
    ],
)
def test_what_makes_no_sense_is_refused(sections: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        check_config(config_of(**sections))


def test_a_budget_is_a_number_of_images() -> None:
    assert budgeted_images(config_of()) is None
    assert budgeted_images(config_of(packing={"max_patches": 196, "token_budget": 2000})) == 10
    few = {"max_patches": 99, "min_patches": 9, "token_budget": 999}
    assert budgeted_images(config_of(packing=few, model={"registers": 4})) == 9


def test_commands_that_show_squares_say_so() -> None:
    with pytest.raises(UserError, match="this command shows squares to the model"):
        check_squares(config_of())
