"""What section `tokens` is refused with, and why."""

import pytest

from fastvit_engine.config import load_config
from fastvit_engine.errors import UserError

DROP = "tokens.patch_drop=0.5"
SIZES = "tokens.image_sizes=[[16, 50%]]"
MAE = ["train.objective=mae", "model.num_classes=0"]
PLAIN = ["model.head=linear", "model.dropout=0"]
DINO = ["train.objective=dino", "model.num_classes=0", "ema.decay=0.9", "dino.local_size=16", "data.eval=null"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([DROP, *MAE], "tokens.patch_drop = 0.5 is for train.objective = classify, and mae chooses itself which"),
        ([SIZES, *DINO], "tokens.image_sizes is set, which is for train.objective = classify, and dino chooses the"),
        ([DROP, "train.objective=mine:Own"], "and mine:Own calls the model itself: set tokens.patch_drop=0"),
        (
            [DROP, "optimizer.frozen=backbone", "optimizer.kind=adamw"],
            "would train the head on other features than it is measured on",
        ),
        ([DROP, "model.pos_embed=relative"], "counts the tokens between two patches, and tokens.patch_drop leaves"),
        ([SIZES, "model.pos_embed=relative"], "is for images of one size, and tokens.image_sizes has others"),
        ([DROP, "tokens.patch_drop_until=0%"], "tokens.patch_drop_until = '0%' drops nothing: set tokens.patch_drop=0"),
        (
            [DROP, "tokens.patch_drop_until=99 epochs", "train.duration=10 epochs"],
            "tokens.patch_drop_until has the point '99 epochs', after the end of train.duration = '10 epochs'",
        ),
        (["tokens.patch_drop=0.001"], "drops 0 of the 64 patches of an image of 32 pixels: drop some and leave some"),
        (["tokens.patch_drop=0.999"], "drops 64 of the 64 patches"),
        ([DROP, "tokens.image_sizes=[[4, 50%]]"], "drops 0 of the 1 patches of an image of 4 pixels"),
        (["tokens.image_sizes=[[18, 50%]]"], "has 18, which is no multiple of the patch size 4 of model.name = Ti/4"),
        (["tokens.image_sizes=[[32, 50%]]"], "has 32, and model.image_size = 32 is what the run ends with"),
        (["tokens.image_sizes=[[64, 50%]]"], "has 64, and model.image_size = 32 is what the run ends with"),
        (["tokens.image_sizes=[[24, 20%], [16, 40%]]"], "has the sizes 24, 16: let each be larger"),
        (["tokens.image_sizes=[[16, 40%], [24, 30%]]"], "has the point '30%' after '40%', which is not earlier"),
        (["tokens.image_sizes=[[16, 100%]]"], "leaves no step to images of model.image_size, which evaluation sees"),
        (["tokens.image_sizes=[[16, 2x]]"], "'2x' is not a duration"),
    ],
)
def test_what_makes_no_sense_is_refused(overrides, message):
    with pytest.raises(UserError) as error:
        load_config("cifar10_cpu", overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("R50x1", "is a ResNet, which has none: set it to 0"),
        ("R26+B/32", "is a hybrid, whose ResNet sees whole images: set it to 0"),
        ("timm/resnet18", "is for the models of this engine, and model.name is timm/resnet18"),
    ],
)
def test_models_without_patches_of_pixels_drop_none(name, message):
    with pytest.raises(UserError) as error:
        load_config("vit_b16_i1k", [f"model.name={name}", *PLAIN, DROP])
    assert message in str(error.value)


def test_what_goes_together():
    config = load_config("cifar10_cpu", [DROP, SIZES, "augment.cutmix=1.0"]).config
    assert (config.tokens.image_sizes, config.tokens.patch_drop_until) == (((16, "50%"),), "90%")
    load_config("vit_b16_i1k", ["model.name=R50x1", *PLAIN, "tokens.image_sizes=[[160, 1 epoch]]"])
    load_config("vit_b16_i1k", ["model.name=R26+B/32", "tokens.image_sizes=[[160, 1 epoch]]"])
