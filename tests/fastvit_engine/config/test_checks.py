"""What is refused because two values contradict each other, before anything is loaded."""

import pytest

from fastvit_engine.config import load_config
from fastvit_engine.config.deepspeed_section import KEYS, OWNED, SECRETS, WITHOUT_EFFECT
from fastvit_engine.errors import UserError


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.name=X50/16"], "model.name 'X50/16' is not a size and a patch size"),
        (["model.name=R51x1"], "model.name 'R51x1' is no hybrid or ResNet that this version knows"),
        (["model.name=R50x1", "model.pool=gap"], "model.pool = gap is of Transformers, and model.name = R50x1 is a"),
        (["model.image_size=30"], "model.image_size 30 is not a multiple of the patch size 4"),
        (["evaluate.fewshot.train=x"], "evaluate.fewshot.train is set and evaluate.fewshot.eval is not: few-shot"),
        (["evaluate.fewshot.eval=x"], "evaluate.fewshot.eval is set and evaluate.fewshot.train is not"),
        (["evaluate.fewshot.every=0 steps"], "evaluate.fewshot.every = '0 steps' is no interval"),
        (["model.heads=5"], "model.heads 5 does not divide model.width 64"),
        (
            ["data.soft_labels=true", "loss.kind=sigmoid"],
            "data.soft_labels are probabilities of which one",
        ),
        (["data.max_labels=3"], "data.max_labels is 3, and a softmax loss takes one label: set loss.kind=sigmoid"),
        (["data.max_labels=11", "loss.kind=sigmoid"], "data.max_labels is 11, more than model.num_classes = 10"),
        (["model.num_classes=0"], "model.num_classes is 0, a model without a head, and training on labels needs one"),
        (["model.num_classes=1"], "a softmax over one class is always 1: set loss.kind=sigmoid"),
        (
            ["data.order=stream", "data.train=[{shards: a}, {shards: b}]"],
            "data.order is stream, which reads one",
        ),
        (["train.duration=0 steps"], "train.duration = '0 steps' trains nothing: lengthen it"),
        (["checkpoint.every=0 steps"], "checkpoint.every = '0 steps' is no interval: lengthen it, or set it to null"),
        (["evaluate.every=0%"], "evaluate.every = '0%' is no interval"),
        (["checkpoint.keep_every=0 epochs"], "checkpoint.keep_every = '0 epochs' is no interval"),
        (
            ["schedule.warmup=20 epochs", "train.duration=10 epochs"],
            "schedule.warmup = '20 epochs' is longer than train.duration = '10 epochs': shorten the one or lengthen",
        ),
        (
            ["schedule.kind=rsqrt", "schedule.warmup=60%", "schedule.cooldown=6 epochs", "train.duration=10 epochs"],
            "schedule.warmup = '60%' + schedule.cooldown = '6 epochs' is longer than train.duration = '10 epochs'",
        ),
        (["schedule.kind=rsqrt", "schedule.timescale=0 steps"], "schedule.timescale = '0 steps' divides by zero"),
        (
            ["schedule.final_learning_rate=1.0", "optimizer.learning_rate=0.1"],
            "schedule.final_learning_rate = 1 is greater than optimizer.learning_rate = 0.1, from which it falls",
        ),
        (["train.duration=50%"], "train.duration = '50%' is a fraction of the run"),
        (["zero.stage=0", "zero.offload=optimizer"], "zero.offload needs ZeRO: set zero.stage to 1, 2 or 3"),
        (["zero.stage=2", "zero.offload=all"], "which needs zero.stage = 3"),
        (["train.micro_batch_trial=true", "train.cuda_graph=true"], "takes too few steps for train.cuda_graph"),
        (["train.micro_batch_trial=true", "train.compile=true"], "for each of which train.compile would compile"),
        (
            ["train.micro_batch_trial=true", "data.decoder=nvjpeg"],
            "would not see the memory that data.decoder",
        ),
        (["train.micro_batch_trial=true", "packing.max_patches=16"], "with packing.max_patches the memory differs"),
        (["checkpoint.keep_best=eval.top1", "data.eval=null"], "needs an evaluation: set data.eval"),
        (["checkpoint.keep_best=eval_ema.top1"], "needs an average of the weights: set ema.decay"),
    ],
)
def test_values_that_contradict_each_other(overrides, message):
    with pytest.raises(UserError) as error:
        load_config("quickstart", overrides)
    assert message in str(error.value)


MAE = ["train.objective=mae", "model.num_classes=0"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.num_classes=10"],
            "model.num_classes is 10, a head that train.objective = mae does not train: set mod",
        ),
        (["model.pool=map"], "model.pool = map is attention pooling, which train.objective = mae does not train"),
        (["model.head=mlp"], "model.head = mlp has no effect with train.objective = mae, which learns without labels"),
        (["init.head=keep"], "init.head = keep has no effect with train.objective = mae, which learns without labels"),
        (["augment.mixup=0.8"], "augment.mixup = 0.8 has no effect .*: set augment.mixup=0$"),
        (["augment.cutmix=1"], "augment.cutmix = 1.0 has no effect .*: set augment.cutmix=0$"),
        (["loss.label_smoothing=0.1"], "loss.label_smoothing = 0.1 has no effect .*: set loss.label_smoothing=0$"),
        (["loss.kind=sigmoid"], "loss.kind = sigmoid has no effect .*: set loss.kind=softmax$"),
        (["data.max_labels=2"], "data.max_labels = 2 has no effect .*: set data.max_labels=1$"),
        (["optimizer.frozen=backbone"], "optimizer.frozen = backbone leaves train.objective = mae nothing to learn"),
        (["checkpoint.keep_best=eval.top1"], "needs labels, and .* has none: set checkpoint.keep_best=eval.loss$"),
        (["mae.decoder_heads=3"], "mae.decoder_heads 3 does not divide mae.decoder_width 512"),
        (
            ["mae.decoder_width=18", "mae.decoder_heads=2"],
            "mae.decoder_width must be a multiple of 4 from 8 on, not 18",
        ),
        (["mae.mask_ratio=0.01"], "mae.mask_ratio = 0.01 hides 0 of the 16 patches of an image: hide some and leave"),
        (["mae.mask_ratio=0.99"], "mae.mask_ratio = 0.99 hides 16 of the 16 patches"),
    ],
)
def test_what_makes_no_sense_without_labels(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config("quickstart", [*MAE, *overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["masked_patch.ratio=0.01"], "masked_patch.ratio = 0.01 chooses none of the 16 patches of an image"),
        (
            ["model.name=Ti/16"],
            "masked_patch.ratio = 0.5 chooses none of the 1 patches of an image, or there is no other",
        ),
        (
            ["masked_patch.target=grid", "model.name=Ti/2"],
            "target = grid cuts patches into 4 x 4 cells, which patches of",
        ),
        (["augment.mixup=0.8"], "augment.mixup = 0.8 has no effect with train.objective = masked_patch"),
        (["model.num_classes=10"], "a head that train.objective = masked_patch does not train"),
    ],
)
def test_what_makes_no_sense_in_masked_patch_prediction(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config("quickstart", ["train.objective=masked_patch", "model.num_classes=0", *overrides])


@pytest.mark.parametrize("settings", [[], ["checkpoint.keep_best=eval.loss"], ["model.pool=gap", "mae.mask_ratio=0.5"]])
def test_training_without_labels_takes_any_recipe(settings):
    assert load_config("quickstart", [*MAE, *settings]).config.pretraining is not None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.activation_checkpointing=some"], "is 'some': write auto, all, or a number of blocks"),
        (["train.activation_checkpointing=-1"], "is '-1': write auto, all, or a number of blocks"),
        (["train.activation_checkpointing=5"], "and Ti/4 has 4 blocks: set train.activation_checkpointing=all"),
        (["train.offload_activations=true"], "and train.activation_checkpointing is auto: set"),
        (["train.offload_activations=true", "train.activation_checkpointing=0"], "train.activation_checkpointing is 0"),
        *(
            (["train.offload_activations=true", setting], "there are none: set train.offload_activations=false")
            for setting in ("optimizer.frozen=backbone", "train.compile=true", "train.cuda_graph=true")
        ),
        (
            ["train.activation_checkpointing=all", "optimizer.frozen=backbone"],
            "with optimizer.frozen = backbone they have none: set train.activation_checkpointing=auto",
        ),
        (
            ["model={name: R50x1, image_size: 32}", "train.activation_checkpointing=all"],
            "is of the blocks of a Transformer, and model.name = R50x1 is a ResNet",
        ),
    ],
)
def test_blocks_that_are_not_there_cannot_be_checkpointed(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config("quickstart", overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["zero.stage=3"], "set zero.stage to 0, 1 or 2, or train.compile=false"),
        (["zero.stage=auto", "zero.offload=all"], "ZeRO-3 gathers them in the middle of the model"),
        (["train.activation_checkpointing=2"], "and train.activation_checkpointing is 2: set one of them only"),
        (["train.objective=mae", "model.num_classes=0"], "train.objective is mae: set train.compile=false"),
        (["packing.max_patches=16", "model.drop_path=0"], "another size: set train.compile=false"),
    ],
)
def test_what_cannot_be_compiled_is_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config("quickstart", ["train.compile=true", *overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["zero.stage=3"], r"which zero\.stage = 3 needs within a step: set zero\.stage to 0, 1 or 2"),
        (["zero.stage=1", "zero.offload=optimizer"], r"which zero\.offload = optimizer needs .* zero\.offload=none"),
        (["train.compile=true"], "and train.compile = true makes it another: set one of them"),
        (["train.activation_checkpointing=all"], "set train.activation_checkpointing=0, or train.cuda_graph=false"),
        (["packing.max_patches=16", "model.drop_path=0"], "another size: set train.cuda_graph=false"),
        (["deepspeed.flops_profiler.enabled=true"], "set deepspeed.flops_profiler.enabled=false, or train.cuda_graph"),
        (["train.objective=moco", "model.num_classes=0"], "in the middle of a pass, which no graph repeats: set"),
        (["model={name: R50+B/16, image_size: 32}"], r"and model\.name is R50\+B/16: set train.cuda_graph=false"),
        (["model={name: R50x1, image_size: 32}"], "and model.name is R50x1: set train.cuda_graph=false"),
        (["model={name: timm/resnet18, image_size: 32}"], "model.name is timm/resnet18: set train.cuda_graph=false"),
    ],
)
def test_what_cannot_be_captured_is_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config("quickstart", ["train.cuda_graph=true", *overrides])


def test_offloading_leaves_the_stage_to_the_engine():
    assert load_config("quickstart", ["zero.stage=auto", "zero.offload=all"]).config.zero.offload == "all"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.type=Lamb", "deepspeed.optimizer is written by the engine: set the 'optimizer' section instead"),
        ("bf16.enabled=true", "deepspeed.bf16.enabled is written by the engine: set train.precision instead"),
        ("fp16={enabled: true}", "deepspeed.fp16.enabled is written by the engine: set train.precision instead"),
        ("torch_autocast.enabled=true", "deepspeed.torch_autocast is written by the engine: set train.precision"),
        ("zero_optimization.stage=1", "deepspeed.zero_optimization.stage is written by the engine: set zero.stage"),
        (
            "zero_optimization.offload_optimizer.device=cpu",
            "offload_optimizer.device is written by the engine",
        ),
        (
            "activation_checkpointing.cpu_checkpointing=true",
            "deepspeed.activation_checkpointing is written by the engine: set train.activation_checkpointing instead",
        ),
        (
            "compile.backend=inductor",
            "deepspeed.compile is written by the engine: set train.compile instead",
        ),
        ("optimizer={}", "deepspeed.optimizer is written by the engine: set the 'optimizer' section instead"),
        (
            "data_types.param_dtype=bf16",
            "deepspeed.data_types.param_dtype is written by the engine: set train",
        ),
        (
            "zero_optimization.cpu_offload=true",
            "zero_optimization.cpu_offload is written by the engine: set zero",
        ),
        (
            "zero_optimization.offload_param.nvme_path=/x",
            "offload_param.nvme_path has no effect: the engine offloads",
        ),
        (
            "zero_optimization.offload_optimizer.pin_memory=true",
            "has no effect with zero.offload = none: remove it",
        ),
        ("aio.block_size=1", "deepspeed.aio has no effect: the engine offloads to host memory, not to NVMe"),
        ("elasticity.enabled=true", "deepspeed.elasticity has no effect: DeepSpeed 0.19.8 no longer has it; remove it"),
        (
            "fp16.loss_scale=128",
            "deepspeed.fp16.loss_scale has no effect with train.precision = fp32: remove it",
        ),
        ("zero_optimization.reduce_bucket_sise=1", "did you mean 'deepspeed.zero_optimization.reduce_bucket_size'?"),
        ("zero_optimization.reduce_bucket_size=auto", "is 'auto': leave it out, and the engine or DeepSpeed chooses"),
        ("zero_optimization.reduce_bucket_size=0", "is 0: it must be an integer greater than 0"),
        ("zero_optimization.sub_group_size=.inf", "is inf: it must be an integer"),
        ("zero_optimization.overlap_comm=1", "is 1: it must be true or false"),
        ("zero_optimization=2", "'deepspeed.zero_optimization' is 2: it must be a mapping of allgather_bucket_size"),
        ("gradient_predivide_factor=.nan", "is nan: it must be a number"),
        ("steps_per_print=1.5", "is 1.5: it must be an integer"),
        ("flops_profiler.module_depth=-2", "is -2: it must be an integer, 0 or more"),
        ("zero_optimisation.stage=1", "did you mean 'deepspeed.zero_optimization'?"),
        ("zzz=1", "DeepSpeed does not know the key 'deepspeed.zzz'; it reads bf16, comet"),
    ],
)
def test_deepspeed_keys_that_another_section_owns_or_that_do_nothing(override, message):
    with pytest.raises(UserError) as error:
        load_config("quickstart", [f"deepspeed.{override}"])
    assert message in str(error.value)


def test_a_secret_of_deepspeed_is_neither_taken_nor_shown():
    with pytest.raises(UserError, match=r"deepspeed\.comet\.api_key .*COMET_API_KEY") as error:
        load_config("quickstart", ["deepspeed.comet.api_key=k3y"])
    assert "k3y" not in str(error.value)


def test_every_key_of_deepspeed_is_known_to_act_to_be_owned_or_to_do_nothing():
    """Against the models of the installed DeepSpeed: a new version's keys are to be decided on."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    for section, model in {
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comet": CometConfig,
        "comms_logger": CommsLoggerConfig,
        "csv_monitor": CSVConfig,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.leaf_module": DeepSpeedZeroLeafModuleConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    }.items():
        theirs = {f"{section}.{field.alias or name}" for name, field in model.model_fields.items()}
        refused = {key for key in (*OWNED, *SECRETS, *WITHOUT_EFFECT) if key.rpartition(".")[0] == section}
        ours = KEYS
        for part in section.split("."):
            ours = ours[part]
        act = {f"{section}.{key}" for key in ours}
        assert theirs - act - refused == set(), section
        assert act - theirs == set() and not act & refused, section


def test_deepspeed_keys_that_act():
    given = ["fp16.loss_scale=128", "zero_optimization.reduce_bucket_size=1e3", "data_types.grad_accum_dtype=bf16"]
    overrides = ["train.precision=fp16", *(f"deepspeed.{override}" for override in given)]
    section = load_config("quickstart", overrides).config.deepspeed
    assert section["fp16"] == {"loss_scale": 128} and section["zero_optimization"] == {"reduce_bucket_size": 1000}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("dino_digits", "dino learns from a teacher, which a trial has not"),
        ("moco_v3_s16", "moco takes all images of a"),
    ],
)
def test_a_trial_of_micro_batches_has_no_teacher(recipe, message):
    with pytest.raises(UserError, match=message):
        load_config(recipe, ["train.micro_batch_trial=true"])
