"""Recipes: their names, what they take from a base, and the rows of the paper."""

from itertools import pairwise

import pytest

from fastvit_engine.config import (
    RECIPES,
    DinoConfig,
    MaeConfig,
    MaskedPatchConfig,
    MocoConfig,
    load_config,
    recipe_names,
    recipe_paths,
)
from fastvit_engine.errors import UserError


@pytest.fixture
def write(tmp_path):
    """write("folder/name.yaml", text) -> the path as text"""

    def write_file(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return write_file


# ---- names


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_and_named_after_its_file(name):
    assert load_config(name).config.name == name


def test_recipes_lie_in_folders_by_source_and_no_name_occurs_twice():
    files = [path for path in RECIPES.rglob("*.yaml") if not path.name.startswith("_")]
    assert len(files) == len(recipe_paths())
    assert {path.parent.parent for path in files} == {RECIPES}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quikstart", "no recipe or file named 'quikstart'; did you mean 'quickstart'?"),
        ("vit_b16", "did you mean 'vit_b16_jft', 'vit_b16_i1k' or 'vit_b16_i21k'?"),
        ("vit_g14_i21k", "'vit_h14_i21k'"),
        ("xxxxxx", "known recipes: augreg_light1, augreg_light2, augreg_medium1, augreg_medium2, cifar10, cifar10_cpu"),
    ],
)
def test_an_unknown_recipe_is_answered_with_near_names(name, message):
    with pytest.raises(UserError) as error:
        load_config(name)
    assert message in str(error.value)


def test_a_run_folder_is_no_recipe_but_holds_one(write, tmp_path):
    path = write("run/config.yaml", "name: again\n")
    with pytest.raises(UserError, match="is a folder, not a recipe: did you mean '.*run/config.yaml'"):
        load_config(str(tmp_path / "run"))
    assert load_config(path).config.name == "again"
    with pytest.raises(UserError, match="is a folder, not a recipe: `photos --set data.train=.*` reads shards there"):
        load_config(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("w.npz", b"PK\3\4 and so on"),
        ("renamed.yaml", b"PK\3\4 and so on"),
        ("w.safetensors", b"\x10\0\0\0\0\0\0\0{}"),
        ("renamed", b"\x10\1\0\0\0\0\0\0{}"),
        ("empty.npz", b""),
    ],
)
def test_weights_are_no_recipe(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    command = rf"is a file of weights, not a recipe: write `fastvit train RECIPE --init \S*{name}`"
    with pytest.raises(UserError, match=command) as error:
        load_config(str(path))
    assert "\n" not in str(error.value)


def test_a_pickle_is_no_recipe_and_no_weights(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"PK\3\4")
    with pytest.raises(UserError, match=r"a file of weights, not a recipe, and a pickle, which is not read"):
        load_config(str(path))


@pytest.mark.parametrize("inside", ["config.json", "manifest.json"])
def test_a_folder_with_a_model_is_no_recipe(tmp_path, inside):
    (tmp_path / inside).write_text("{}")
    with pytest.raises(UserError, match=r"is a model, not a recipe: write `fastvit train RECIPE --init"):
        load_config(str(tmp_path))


# ---- files

# Each line has ten times the values of the one before: billions in the end.
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in pairwise("abcdefghij")
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 10)}]}}\n" for before, name in pairwise("abcdefghij")
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  name: [B/16\n", r"bad.yaml line \d is not valid YAML"),
        ("just words", "must hold sections such as 'model:' and 'train:', not a single str"),
        ("- a\n- b\n", "not a single list"),
        (
            "model:\n  name: B/16\ndata:\n  window: 8\nmodel:\n  pool: gap\n",
            "bad.yaml:5 sets 'model' again, after line 1",
        ),
        ("model:\n  name: B/16\n  name: L/16\n", "bad.yaml:3 sets 'model.name' again, after line 2"),
        (
            "data:\n  train:\n    - {shards: c, weight: 1}\n    - {shards: a, shards: b}\n",
            r"bad.yaml:4 sets 'data.train\[1\].shards' again, after line 4",
        ),
        ("- a\n- b: 1\n  b: 2\n", r"bad.yaml:3 sets '\[1\].b' again, after line 2"),
        ("data:\n  train: &t\n    - *t\n", r"bad.yaml line 3 is not valid YAML: the alias \*t refers to what it is in"),
        ("model: &m\n  name: *m\n", r"bad.yaml line 2 is not valid YAML: the alias \*m refers to what it is in"),
        ("[" * 100_000, "bad.yaml line 1 is not valid YAML: more than 50 collections are nested in each other"),
        ("- " * 20_000, "more than 50 collections are nested in each other"),
        (BOMB, "bad.yaml line 5 is not valid YAML: it holds more than 100,000 values, with those that aliases repeat"),
        (MERGES, "bad.yaml line 6 is not valid YAML: it holds more than 100,000 values, with those that aliases"),
        ("x" * (1 << 23), "bad.yaml is not valid YAML: it has more than 4,194,304 characters"),
        ("name: 2024-13-45\n", r"is not valid YAML: a value cannot be read \(month must be in 1..12\)"),
        ("seed: 0b_\n", r"'seed' \(bad.yaml:1\) is '0b_': input should be a valid integer"),
        ("seed: " + "9" * 5000, "bad.yaml line 1 is not valid YAML: it holds a number of too many digits"),
        ("name: !!timestamp x\n", "is not valid YAML: a value cannot be read"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused(write, text, message):
    with pytest.raises(UserError, match=message) as error:
        load_config(write("bad.yaml", text))
    assert len(str(error.value)) < 1000 and "\n" not in str(error.value)


def test_anchors_and_merges_within_reason_are_read(write):
    text = "x: &a {name: Ti/4, image_size: 8}\nmodel: {<<: *a, num_classes: 3}\n".replace("x: ", "model2: ")
    with pytest.raises(UserError, match="unknown configuration key 'model2"):
        load_config(write("mine.yaml", text))
    path = write("mine.yaml", "augment: {mixup: &p 0.5, cutmix: *p}\n")
    assert load_config(path).config.augment.cutmix == 0.5


def test_bytes_that_are_not_text_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(str(path))
    path.write_bytes(b"\xef\xbb\xbfname: marked\n")
    assert load_config(str(path)).config.name == "marked"


def test_an_empty_recipe_is_all_defaults(write):
    assert set(load_config(write("empty.yaml", "# nothing\n")).origins.values()) == {"default"}


# ---- bases


def test_a_recipe_states_only_what_differs_from_its_base(write):
    write("bases/base.yaml", "name: base\nmodel:\n  name: Ti/4\n  image_size: 16\ndeepspeed:\n  wandb:\n    team: a\n")
    path = write("mine.yaml", "base: bases/base.yaml\nmodel:\n  image_size: 32\ndeepspeed:\n  wandb:\n    group: b\n")
    resolved = load_config(path, ["model.depth=2"])
    model = resolved.config.model
    assert (resolved.config.name, model.name, model.image_size, model.depth) == ("base", "Ti/4", 32, 2)
    assert resolved.config.deepspeed == {"wandb": {"team": "a", "group": "b"}}
    origins = {key: resolved.origins[key] for key in ("name", "model.name", "model.image_size", "model.depth")}
    assert origins == {
        "name": "base.yaml:1",
        "model.name": "base.yaml:3",
        "model.image_size": "mine.yaml:3",
        "model.depth": "--set",
    }


def test_lists_and_values_of_a_base_are_replaced_whole(write):
    write("base.yaml", "optimizer:\n  betas: [0.8, 0.9]\ndata:\n  train:\n  - shards: a\n  - shards: b\n")
    config = load_config(
        write("mine.yaml", "base: base.yaml\noptimizer:\n  betas: [0.7, 0.95]\ndata:\n  train: c\n")
    ).config
    assert config.optimizer.betas == (0.7, 0.95) and config.data.train == "c"


def test_a_base_may_be_a_shipped_recipe_and_have_a_base_itself(write):
    middle = write("middle.yaml", "base: vit_b16_i21k\nname: middle\n")
    resolved = load_config(write("mine.yaml", f"base: {middle}\nname: mine\nmodel:\n  name: S/16\n"))
    assert (resolved.config.name, resolved.config.model.name) == ("mine", "S/16")
    assert resolved.config.model.num_classes == 21843
    assert resolved.origins["model.num_classes"] == "_i21k.yaml:4"
    assert resolved.origins["train.global_batch_size"] == "_pretraining.yaml:5"


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("vit_b16_i21", r"no base \(mine.yaml:2\) named 'vit_b16_i21'; did you mean 'vit_b16_i21k'"),
        ("other.yaml", r"no base \(mine.yaml:2\) named 'other.yaml'"),
        ("mine.yaml", "mine.yaml:2: base 'mine.yaml' leads back to mine.yaml"),
        ("[a, b]", r"mine.yaml:2: base is \['a', 'b'\]: it must be the name of a recipe"),
        ("", "mine.yaml:2: base is None"),
    ],
)
def test_a_base_that_cannot_be_is_refused(write, base, message):
    with pytest.raises(UserError, match=message) as error:
        load_config(write("mine.yaml", f"name: mine\nbase: {base}\n"))
    assert "\n" not in str(error.value)


def test_bases_in_a_circle_are_refused(write):
    write("a.yaml", "base: b.yaml\n")
    write("b.yaml", "base: folder/c.yaml\n")
    write("folder/c.yaml", "base: ../a.yaml\n")
    with pytest.raises(UserError, match="c.yaml:1: base '../a.yaml' leads back to a.yaml"):
        load_config(write("mine.yaml", "base: a.yaml\n"))


# ---- the paper

# Dosovitskiy et al. 2021, Table 3: epochs, peak learning rate, schedule, weight decay, dropout.
TABLE_3 = {
    "vit_b16_jft": (7, 8e-4, "linear", 0.1, 0.0),
    "vit_b32_jft": (7, 8e-4, "linear", 0.1, 0.0),
    "vit_l32_jft": (7, 6e-4, "linear", 0.1, 0.0),
    "vit_l16_jft": (14, 4e-4, "linear", 0.1, 0.0),
    "vit_h14_jft": (14, 3e-4, "linear", 0.1, 0.0),
    **{f"vit_{size}_i21k": (90, 1e-3, "linear", 0.03, 0.1) for size in ("b16", "b32", "l16", "l32", "h14")},
    **{f"vit_{size}_i1k": (300, 3e-3, "cosine", 0.3, 0.1) for size in ("b16", "b32", "l16", "l32")},
}
# Elsewhere in the paper: classes, loss, initial bias of the head, gradient norm, final learning rate, samples.
BY_DATASET = {
    "jft": (18291, "sigmoid", -10.0, None, 0.0, 303_000_000),
    "i21k": (21843, "sigmoid", -10.0, None, 1e-5, 12_400_000),
    "i1k": (1000, "softmax", 0.0, 1.0, 0.0, None),
}


# Of the same table: model, learning rate.
CONVOLUTIONS = {"hybrid_r50_b16_jft": ("R50+B/16", 8e-4), "resnet_r50x1_jft": ("R50x1", 1e-3)}


def test_the_paper_folder_holds_the_rows_of_table_3():
    """One of each other family, and H/14 on ImageNet-21k, which the table does not have."""
    found = {name for name, path in recipe_paths().items() if path.parent.name == "paper"}
    assert found == TABLE_3.keys() | CONVOLUTIONS.keys()


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_row_of_a_hybrid_or_resnet(name):
    """As the Vision Transformer on JFT of as many epochs, but for the model, its head and the learning rate."""
    config, vit = load_config(name).config, load_config("vit_b16_jft").config
    assert (config.model.name, config.optimizer.learning_rate) == CONVOLUTIONS[name]
    model = {"name": vit.model.name} | ({"head": "mlp"} if name.startswith("resnet") else {})
    same = config.model_copy(update={
        "name": vit.name,
        "model": config.model.model_copy(update=model),
        "optimizer": config.optimizer.model_copy(update={"learning_rate": vit.optimizer.learning_rate}),
    })  # fmt: skip
    assert same == vit


@pytest.mark.parametrize("name", TABLE_3)
def test_a_row_of_table_3(name):
    config = load_config(name).config
    epochs, rate, schedule, decay, dropout = TABLE_3[name]
    _, size, dataset = name.split("_")
    assert config.model.name == f"{size[0].upper()}/{size[1:]}"
    assert config.train.duration == f"{epochs} epochs"
    optimizer = config.optimizer
    assert (optimizer.learning_rate, config.schedule.kind, optimizer.weight_decay) == (rate, schedule, decay)
    model, train = config.model, config.train
    found = (model.num_classes, config.loss.kind, model.head_bias, train.grad_clip)
    assert (*found, config.schedule.final_learning_rate, config.data.train_samples) == BY_DATASET[dataset]
    assert (model.dropout, model.head, model.image_size, model.pool) == (dropout, "mlp", 224, "cls")
    assert (train.global_batch_size, optimizer.betas, config.schedule.warmup) == (4096, (0.9, 0.999), "10000 steps")
    assert (train.precision, config.evaluate.every) == ("bf16", "5%")


# Table 4: classes, steps, the learning rates that are tried; big_vision's transfer.py: the warm-up.
TABLE_4 = {
    "finetune_imagenet": (1000, 20_000, (0.003, 0.01, 0.03, 0.06), 500),
    "finetune_cifar10": (10, 10_000, (0.001, 0.003, 0.01, 0.03), 500),
    "finetune_cifar100": (100, 10_000, (0.001, 0.003, 0.01, 0.03), 500),
    "finetune_pets": (37, 500, (0.001, 0.003, 0.01, 0.03), 100),
    "finetune_flowers": (102, 500, (0.001, 0.003, 0.01, 0.03), 100),
    "finetune_vtab": (None, 2_500, (0.01,), 500),
}


def test_the_finetune_folder_holds_the_rows_of_table_4_and_our_own():
    found = {name for name, path in recipe_paths().items() if path.parent.name == "finetune"}
    assert found == {*TABLE_4, "finetune_cifar10_cpu", "finetune_photos", "probe"}


@pytest.mark.parametrize("name", TABLE_4)
def test_a_row_of_table_4(name):
    config = load_config(name, {"init.from": "weights.npz"}).config
    classes, steps, rates, warmup = TABLE_4[name]
    assert config.train.duration == f"{steps} steps"
    if classes is not None:
        assert config.model.num_classes == classes
    optimizer, schedule, train = config.optimizer, config.schedule, config.train
    assert optimizer.learning_rate in rates
    assert all(f"{rate:g}" in recipe_paths()[name].read_text() for rate in rates)
    assert (optimizer.kind, optimizer.momentum, optimizer.weight_decay) == ("sgd", 0.9, 0.0)
    assert (optimizer.frozen, optimizer.layer_decay) == ("none", None)
    assert (schedule.kind, schedule.warmup, schedule.final_learning_rate) == ("cosine", f"{warmup} steps", 0.0)
    assert (train.global_batch_size, train.grad_clip, config.model.image_size) == (512, 1.0, 384)
    assert (config.init.head, config.init.interpolation, config.loss.kind) == ("new", "bilinear", "softmax")
    given = config.model.model_fields_set
    # the weights say all else, and VTAB's classes are the task's
    assert given == ({"image_size"} if classes is None else {"image_size", "num_classes"})
    assert config.data.model_fields_set.isdisjoint({"mean", "std"})


@pytest.mark.parametrize("name", ["finetune_cifar10_cpu", "finetune_photos", "probe"])
def test_our_own_finetuning_takes_any_model(name):
    config = load_config(name, {"init.from": "weights.npz"}).config
    assert config.model.model_fields_set <= {"image_size", "dropout", "drop_path"}  # classes: of the data, or the head
    assert config.optimizer.frozen == ("backbone" if name == "probe" else "none")


def test_masked_autoencoding_has_the_values_of_its_paper():
    """He et al. 2022, tables 8 and 9; learning rates are per 256 images there."""
    pretraining, finetuning = (load_config(name).config for name in ("mae_h14", "mae_h14_finetune"))
    assert pretraining.pretraining == MaeConfig(mask_ratio=0.75, decoder_width=512, decoder_depth=8, decoder_heads=16)
    for config, rate, batch, betas in ((pretraining, 1.5e-4, 4096, 0.95), (finetuning, 1e-3, 1024, 0.999)):
        assert config.train.global_batch_size == batch
        assert config.optimizer.learning_rate == pytest.approx(rate * batch / 256)
        assert (config.optimizer.betas, config.optimizer.weight_decay) == ((0.9, betas), 0.05)
        assert (config.model.pool, config.schedule.kind, config.train.grad_clip) == ("gap", "cosine", None)
    assert (pretraining.train.duration, pretraining.schedule.warmup) == ("800 epochs", "40 epochs")
    assert (finetuning.train.duration, finetuning.schedule.warmup) == ("50 epochs", "5 epochs")
    assert (finetuning.optimizer.layer_decay, finetuning.model.drop_path) == (0.75, 0.3)


def test_self_distillation_has_the_values_of_its_authors_code():
    """Defaults of main_dino.py in facebookresearch/dino; learning rates are per 256 images there."""
    config = load_config("dino_s16").config
    assert config.pretraining == DinoConfig()
    assert config.optimizer.learning_rate == pytest.approx(5e-4 * config.train.global_batch_size / 256)
    assert (config.ema.decay, config.model.drop_path, config.schedule.final_learning_rate) == (0.996, 0.1, 1e-6)


def test_momentum_contrast_has_the_values_of_its_authors_code():
    """Those of the README for ViT-S, with the batch of its results; learning rates are per 256 images there."""
    config = load_config("moco_v3_s16").config
    assert config.pretraining == MocoConfig()
    assert (config.train.global_batch_size, config.train.duration, config.schedule.warmup) == (
        4096,
        "300 epochs",
        "40 epochs",
    )
    assert config.optimizer.learning_rate == pytest.approx(1.5e-4 * config.train.global_batch_size / 256)
    assert (config.ema.decay, config.optimizer.weight_decay, config.schedule.kind) == (0.99, 0.1, "cosine")
    assert (config.model.heads, config.model.pos_embed, config.train.grad_clip) == (12, "sincos_2d", None)


@pytest.mark.parametrize(
    ("recipe", "before"),
    [
        ("quickstart", "mae_digits"),
        ("quickstart", "dino_digits"),
        ("cifar10_cpu", "mae_cifar10_cpu"),
        ("cifar10_cpu", "masked_patch_cifar10_cpu"),
        ("cifar10_cpu", "moco_cifar10_cpu"),
    ],
)
def test_a_small_recipe_has_the_shape_of_the_one_that_it_can_start_from(recipe, before):
    model, encoder = (load_config(name).config.model for name in (recipe, before))
    given = model.model_fields_set - {"num_classes"}
    assert {key: getattr(model, key) for key in given} == {key: getattr(encoder, key) for key in given}


def test_masked_patch_prediction_has_the_values_of_the_paper():
    config = load_config("masked_patch_b16_jft").config
    assert (config.model.name, config.train.duration, config.train.global_batch_size) == ("B/16", "1000000 steps", 4096)
    assert config.pretraining == MaskedPatchConfig(ratio=0.5, target="mean")
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (2e-4, 0.0)
    assert (config.schedule.kind, config.schedule.warmup) == ("cosine", "10000 steps")


def test_scaling_vision_transformers_has_the_values_of_its_authors_code():
    """train_vit_g.py of big_vision; its weight decay has no factor of the learning rate."""
    config = load_config("vit_g14_jft3b").config
    optimizer, schedule, rate = config.optimizer, config.schedule, 8e-4
    assert (config.model.name, config.model.pool, config.model.num_classes) == ("g/14", "map", 29_593)
    assert (optimizer.kind, optimizer.learning_rate, optimizer.betas, optimizer.eps) == (
        "adafactor", rate, (0.9, 0.999), 1e-30,
    )  # fmt: skip
    assert optimizer.weight_decay * rate == pytest.approx(0.03 * 8e-4)
    assert optimizer.head_weight_decay == pytest.approx(100 * optimizer.weight_decay)
    assert (schedule.kind, schedule.timescale, schedule.warmup, schedule.cooldown) == (
        "rsqrt", "10000 steps", "10000 steps", "50000 steps",
    )  # fmt: skip
    train = config.train
    assert (train.duration, train.global_batch_size, train.grad_clip) == ("1000000 steps", 4 * 4096, 1.0)
    assert (config.loss.kind, config.model.head_bias) == ("sigmoid", -10.0)


# Of big_vision's vit_i1k.py: RandAugment's magnitude, and mixup.
AUGREG = {"light1": (0, 0.0), "light2": (10, 0.2), "medium1": (15, 0.2), "medium2": (15, 0.5)}


@pytest.mark.parametrize("level", AUGREG)
def test_levels_of_augmentation_differ_in_nothing_else(level):
    config = load_config(f"augreg_{level}").config
    augment, train = config.augment, config.train
    assert (augment.randaugment_magnitude, augment.mixup) == AUGREG[level]
    assert (augment.randaugment_ops, augment.randaugment_policy, augment.cutmix) == (2, "big_vision", 0.0)
    assert (train.duration, train.global_batch_size, config.schedule.kind) == ("300 epochs", 4096, "cosine")
    assert (config.loss.kind, config.model.head_bias, config.model.head) == ("sigmoid", -6.9, "mlp")
    other = load_config("augreg_light2").config
    same = {"name": "same", "augment": augment}
    assert config.model_copy(update=same) == other.model_copy(update=same)


def test_the_variant_with_muon_differs_in_the_optimizer_alone():
    muon, adamw = (load_config(name).config for name in ("vit_s16_i1k_90_muon", "vit_s16_i1k_90"))
    assert (muon.optimizer.kind, muon.optimizer.momentum, adamw.optimizer.kind) == ("muon", 0.95, "adamw")
    optimizer = muon.optimizer.model_copy(update={"kind": "adamw", "momentum": adamw.optimizer.momentum})
    assert muon.model_copy(update={"optimizer": optimizer, "name": adamw.name}) == adamw
