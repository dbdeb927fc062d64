"""Runs of timm's models: they learn what a plain loop around the same model learns, and resume to the bit."""

import contextlib
import importlib
import importlib.util
import json
import signal
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from fastvit_engine import evaluate, load_config, load_model
from fastvit_engine import train as train_here
from fastvit_engine.checkpoint.export import find_checkpoint
from fastvit_engine.cli import main
from fastvit_engine.config import ModelConfig, OptimizerConfig
from fastvit_engine.data.stream.batch_split import split_batch
from fastvit_engine.data.stream.prepare import eval_streams, prepare_data
from fastvit_engine.engine.optimizers.groups import parameter_groups
from fastvit_engine.errors import UserError
from fastvit_engine.models.timm_library import import_timm
from fastvit_engine.models.timm_model import build_timm
from fastvit_engine.observe.metrics import read_all_metrics
from fastvit_engine.train.start import check_whole_batches
from tests.fastvit_engine.conftest import TINY_RUN
from tests.fastvit_engine.train import ill_fated_rank
from tests.fastvit_engine.train.test_finetune import at_stage, figures, losses, whole
from tests.fastvit_engine.warm_ranks import exit_codes_of
from tests.in_full import in_full

timm = import_timm()

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

DOCS = Path(__file__).parents[3] / "docs"
OWN = [
    *(setting for setting in TINY_RUN if not setting.startswith("model.")),
    *(f"model.{key}=null" for key in ("width", "depth", "heads")),
    "model.image_size=32",
    "train.global_batch_size=8",
    "train.precision=fp32",
    "train.duration=20 steps",
    "schedule.kind=constant",
    "schedule.warmup=1 step",
    "optimizer.learning_rate=1e-4",
    "optimizer.weight_decay=0.05",
    "optimizer.eps=1e-3",
    "train.grad_clip=null",
]
# Small ones: a Swin Transformer of few layers, and timm's own models for tests.
SMALL = {
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2]}),
    "efficientnet": ("test_efficientnet", {}),
    "vit": ("test_vit", {}),
    "resnet": ("test_resnet", {}),
    "convnext": ("test_convnext", {}),
}
WHOLE = {
    "Swin-T": "swin_tiny_patch4_window7_224",
    "Mixer-S/16": "mixer_s16_224",
    "PoolFormer-S12": "poolformer_s12",
    "EfficientNet-B0": "efficientnet_b0",
    "DeiT-Ti": "deit_tiny_patch16_224",
    "DeiT-Ti, distilled": "deit_tiny_distilled_patch16_224",
    "ViT with registers": "vit_small_patch14_reg4_dinov2",
    "ConvNeXt": "convnext_atto",
    "ResNet": "resnet18",
}


# Batch normalisation over a map of one pixel multiplies what rounds off: images of 64 pixels leave it four.
SIZES = {"ViT with registers": 28, "resnet": 64, "ResNet": 64, "EfficientNet-B0": 64}


def named(name):
    """The settings of a model of SMALL or of WHOLE."""
    architecture, arguments = SMALL[name] if name in SMALL else (WHOLE[name], {})
    given = [f"model.timm.{key}={value}" for key, value in arguments.items()]
    return [f"model.name=timm/{architecture}", f"model.image_size={SIZES.get(name, 32)}", *given]


@pytest.fixture(scope="module")
def run_here(digits):
    """Trains in this process, which has imported timm already."""

    def run(out, *settings, resume=False):
        config = load_config("quickstart", [f"data.train={digits}/train-*.tar", *OWN, *settings])
        with contextlib.ExitStack() as patched:
            patch = patched.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(F, "linear", F.linear)  # ZeRO-3 exchanges it
            train_here(config, out, resume=resume)
        return out

    return run


def plain(digits, tmp_path, *settings):
    """The losses of a loop without the engine, over the same batches, and the weights after it."""
    config = load_config("quickstart", [f"data.train={digits}/train-*.tar", *OWN, *settings]).config
    given = {"num_classes": config.model.num_classes, "img_size": config.model.image_size, "drop_path_rate": 0.0}
    torch.manual_seed(config.seed)
    try:
        model = timm.create_model(config.model.name.removeprefix("timm/"), **given, **config.model.timm)
    except TypeError:
        del given["img_size"]
        torch.manual_seed(config.seed)
        model = timm.create_model(config.model.name.removeprefix("timm/"), **given, **config.model.timm)
    is_matrix = {name: name.endswith(".weight") and p.ndim >= 2 for name, p in model.named_parameters()}
    groups = [
        {"params": [p for name, p in model.named_parameters() if is_matrix[name] is matrix], "weight_decay": decay}
        for matrix, decay in ((True, config.optimizer.weight_decay), (False, 0.0))
    ]
    settings = config.optimizer
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps)
    data = prepare_data(config, world_size=1, index_folder=tmp_path)
    batches = data.train_batches(
        config, rank=0, world_size=1, micro_batch_size=8, consumed=0, pin_memory=False, node_ranks=(), skipped=()
    )
    mean, std = (torch.tensor(figures).view(3, 1, 1) for figures in (config.data.mean, config.data.std))
    found = []
    for _ in range(20):
        batch = next(batches)
        images = (batch.images.permute(0, 3, 1, 2).float() / 255 - mean) / std
        loss = F.cross_entropy(model.train()(images), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found, model


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("swin", 3),
        ("efficientnet", 0),
        *(in_full(name, stage) for name in SMALL for stage in (0, 3)),
        *(in_full(name, stage) for name in WHOLE for stage in (0, 3)),
    ],
)
def test_a_run_learns_what_a_plain_loop_learns(run_here, digits, tmp_path, name, stage):
    settings = [*named(name), *at_stage(stage)]
    run = run_here(tmp_path / "run", *settings)
    expected, model = plain(digits, tmp_path, *settings)
    assert losses(run) == pytest.approx(expected, abs=1e-5)
    exported = load_file(run / "model.safetensors")
    assert exported.keys() == model.state_dict().keys()  # timm's names, and its running statistics
    for key, tensor in model.state_dict().items():
        assert exported[key].dtype == tensor.dtype, key
        assert torch.allclose(exported[key].float(), tensor.float(), atol=1e-4), key


KEPT = ["ema.decay=0.9", "train.duration=6 steps", "model.drop_path=0.2", "model.dropout=0.1", "zero.stage=3"]


@pytest.fixture(scope="module")
def run(run_here, digits, tmp_path_factory):
    """A run with running statistics, an average, dropout, drop path and an evaluation."""
    settings = [*named("efficientnet"), *KEPT, f"data.eval={digits}/eval-*.tar", "evaluate.every=6 steps"]
    few_shot = [
        *(f"evaluate.fewshot.{key}={digits}/eval-*.tar" for key in ("train", "eval")),
        "evaluate.fewshot.shots=[1]",
    ]
    return run_here(tmp_path_factory.mktemp("kept") / "run", *settings, *few_shot)


def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(run, run_here, digits, tmp_path):
    other, data = tmp_path / "run", [f"data.eval={digits}/eval-*.tar", "evaluate.every=6 steps"]
    for number, duration in enumerate(("train.duration=3 steps", "train.duration=6 steps")):
        run_here(other, *named("efficientnet"), *KEPT, *data, duration, resume=number > 0)
    assert figures(other) == figures(run)
    kinds = find_checkpoint(str(run)).read_manifest().kinds
    assert kinds == {"weight", "ema", "buffer", "ema_buffer", "exp_avg", "exp_avg_sq"}
    for name in ("model.safetensors", "model_ema.safetensors"):
        ours, theirs = load_file(other / name), load_file(run / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("name", "stage"),
    [("efficientnet", 3), *(in_full(name, stage) for name in ("swin", *list(WHOLE)[:5]) for stage in (0, 3))],
)
def test_killed_and_resumed_to_the_bit(train, train_arguments, tmp_path, name, stage):
    """Two processes are killed after five steps, which leaves the checkpoint of step 4, or of step 2."""
    settings = [*OWN, *named(name), *at_stage(stage), "ema.decay=0.9", "train.duration=6 steps", "model.drop_path=0.2"]
    settings += ["checkpoint.every=2 steps"]
    undisturbed = train(tmp_path / "undisturbed", *settings, processes=2)
    run, log = tmp_path / "run", tmp_path / "log"
    moment = partial(ill_fated_rank.after_step, 5)
    codes = exit_codes_of(train_arguments(run, *settings), 2, log, before=moment)
    assert -signal.SIGKILL in codes and 0 not in codes, log.read_text()
    assert losses(run) == losses(undisturbed)[:5]
    train(run, *settings, processes=2, resume="auto")
    assert figures(run) == figures(undisturbed)
    for file in ("model.safetensors", "model_ema.safetensors"):
        ours, theirs = load_file(run / file), load_file(undisturbed / file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_average_has_running_statistics_of_its_own(run):
    weights, average = (load_file(run / f"{name}.safetensors") for name in ("model", "model_ema"))
    running = [key for key in weights if "running_" in key]
    assert len(running) > 20 and all(not torch.equal(weights[key], average[key]) for key in running)
    assert {int(weights[key]) for key in weights if key.endswith("num_batches_tracked")} == {6}


def test_the_model_comes_back_from_the_run_and_from_its_file(run, digits):
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    for averaged, name in ((False, "model"), (True, "model_ema")):
        model, of_file = load_model(run, ema=averaged), load_model(run / f"{name}.safetensors")
        theirs = timm.create_model("test_efficientnet", num_classes=10)
        theirs.load_state_dict(load_file(run / f"{name}.safetensors"))
        theirs.eval()
        pixels = (images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
        with torch.no_grad():
            expected = theirs(pixels)
            assert torch.equal(model(images), expected) and torch.equal(of_file(images), expected)
            assert torch.equal(model(pixels), expected)
            represented = theirs.forward_head(theirs.forward_features(pixels), pre_logits=True)
            assert torch.equal(model.represent(images), represented)
    written = read_all_metrics(run / "metrics.jsonl")
    assert [row["eval"] for row in written.few_shot] == ["fewshot", "fewshot_ema"]
    measured = written.evaluations
    for row, averaged in zip(measured, (False, True), strict=True):
        accuracy = evaluate(load_model(run, ema=averaged), f"{digits}/eval-*.tar", config="quickstart")
        assert accuracy.top1 == row["top1"] and accuracy.loss == pytest.approx(row["loss"], abs=1e-5)


def test_statistics_of_two_processes_are_those_of_one(train, run_here, tmp_path):
    """Batch normalisation is by the images of all processes, and so are its gradients."""
    settings = [*OWN, *named("efficientnet"), "train.duration=4 steps", "ema.decay=0.9"]
    alone = run_here(tmp_path / "alone", *settings)
    two = train(tmp_path / "two", *settings, *at_stage(3), processes=2)
    assert losses(two) == pytest.approx(losses(alone), abs=1e-5)
    for name in ("model.safetensors", "model_ema.safetensors"):
        ours, theirs = load_file(two / name), load_file(alone / name)
        assert all(torch.allclose(ours[key], theirs[key], atol=1e-4) for key in theirs)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_layer_decay_counts_the_layers_as_timm_does(name):
    model = build_timm(ModelConfig(name=f"timm/{name}", image_size=32, num_classes=10), mean=(0.5,) * 3, std=(0.5,) * 3)
    ours = parameter_groups(model, OptimizerConfig(layer_decay=0.5, weight_decay=0.1))
    theirs = importlib.import_module("timm.optim").param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5)
    scales = {id(parameter): group["learning_rate_scale"] for group in ours for parameter in group["params"]}
    expected = {id(parameter): group["lr_scale"] for group in theirs for parameter in group["params"]}
    assert scales == expected and len(set(scales.values())) > 4


def test_a_batch_that_processes_cannot_share_equally_is_refused(run_here, tmp_path):
    config = load_config("quickstart", [*OWN, *named("efficientnet"), "train.global_batch_size=9"]).config
    with pytest.raises(UserError, match="normalises by the images of a micro-batch"):
        check_whole_batches(config, split_batch(config, 2))
    check_whole_batches(config, split_batch(config, 3))


def test_bf16_keeps_running_statistics_in_float32(run_here, tmp_path):
    out = run_here(tmp_path / "run", *named("resnet"), "train.precision=bf16", "train.duration=2 steps", "zero.stage=2")
    stored = whole(out, 2, "weight")
    assert all(values.dtype == torch.float32 for values in stored.values())
    tensors = load_file(out / "model.safetensors")
    means = [tensor for key, tensor in tensors.items() if key.endswith("running_mean")]
    assert means and all(mean.dtype == torch.float32 for mean in means)
    assert any(not torch.equal(mean, mean.bfloat16().float()) for mean in means)


@pytest.mark.parametrize("stage", [0, in_full(3)])
def test_bf16_trains_models_that_add_buffers_to_parameters(run_here, tmp_path, stage):
    """Of BEiT, queries and values have a bias, and keys a buffer of zeros between the two; Swin has masks."""
    beit = ["model.name=timm/beit_base_patch16_224", "model.timm.embed_dim=32", "model.timm.depth=1"]
    swin = [*named("swin"), "model.image_size=56", "model.timm.depths=[2,1]"]
    for number, own in enumerate(([*beit, "model.timm.num_heads=2"], swin)):
        settings = [*own, *at_stage(stage), "train.precision=bf16", "train.duration=2 steps"]
        out = run_here(tmp_path / str(number), *settings)
        exact = run_here(tmp_path / f"{number}-exact", *settings, "train.precision=fp32")
        assert losses(out) == pytest.approx(losses(exact), abs=0.02)


def test_fine_tuning_begins_with_the_weights_of_a_run_and_with_a_new_head(run, run_here, tmp_path):
    settings = [f"init.from={run}", *named("efficientnet"), "model.num_classes=12", "train.duration=1 step"]
    begun = run_here(tmp_path / "run", *settings, "optimizer.frozen=backbone")
    before, source = whole(begun, 0), load_file(run / "model.safetensors")
    for name, values in before.items():
        expected = torch.zeros_like(values) if name.startswith("classifier.") else source[name].flatten()
        assert torch.equal(values, expected), name
    after = load_file(begun / "model.safetensors")
    assert all(torch.equal(after[key], source[key]) for key in source if not key.startswith("classifier."))
    assert after["classifier.weight"].abs().max() > 0


def test_runs_begin_with_a_file_of_timm_which_timm_itself_reads(run_here, tmp_path):
    """For other images and classes; the tables of a Swin Transformer are resampled as timm does it."""
    torch.manual_seed(3)
    theirs = timm.create_model(SMALL["swin"][0], num_classes=7, img_size=224, **SMALL["swin"][1])
    save_file(theirs.state_dict(), tmp_path / "swin.safetensors")
    settings = [*named("swin"), f"init.from={tmp_path / 'swin.safetensors'}", "train.duration=1 step"]
    begun = run_here(tmp_path / "run", *settings, "model.num_classes=10")
    assert load_config(begun / "config.yaml").config.data.mean == pytest.approx((0.485, 0.456, 0.406))
    before = whole(begun, 0)
    name = "layers.0.blocks.0.attn.qkv.weight"
    assert torch.equal(before[name], theirs.state_dict()[name].flatten())
    assert not before["head.fc.weight"].any()


def test_a_file_that_is_not_of_the_model_is_refused_by_name_of_the_parameter(tmp_path):
    theirs = timm.create_model("test_vit", num_classes=7).state_dict()
    save_file(theirs, tmp_path / "whole.safetensors")
    assert load_model(tmp_path / "whole.safetensors", name="timm/test_vit").config.num_classes == 7
    save_file({name: tensor for name, tensor in theirs.items() if name != "norm.weight"}, tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match=r"norm\.weight"):
        load_model(tmp_path / "cut.safetensors", name="timm/test_vit")
    with pytest.raises(UserError, match="test_resnet"):
        load_model(tmp_path / "whole.safetensors", name="timm/test_resnet")


def test_ones_own_model_trains_and_comes_back(run_here, digits, tmp_path, monkeypatch, capsys):
    page = (DOCS / "guides" / "timm-models.md").read_text()
    code = page.partition("## A model of your own")[2].partition("```python\n")[2].partition("```")[0]
    (tmp_path / "my_nets.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = "timm/my_nets:my_net"
    out = run_here(tmp_path / "run", f"model.name={name}", "model.timm.width=6", "zero.stage=0")
    model = load_model(out)
    assert model.patches.weight.shape == (6, 3, 4, 4) and model.represent(torch.zeros(1, 3, 32, 32)).shape == (1, 6)
    assert losses(out)[-1] < losses(out)[0]

    monkeypatch.delitem(sys.modules, "my_nets")  # as in another process: what a file names is not imported
    for source in (str(out), str(out / "model.safetensors")):
        assert main(["evaluate", source, "--data", f"{digits}/eval-*.tar"]) == 2
        assert f"give --name {name}" in capsys.readouterr().err and "my_nets" not in sys.modules
    assert main(["evaluate", str(out), "--data", f"{digits}/eval-*.tar", "--name", name]) == 0
    assert "top-1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["model.pool=gap"], "model.pool = gap shapes the Vision Transformers"),
        (["model.width=64"], "model.width = 64 shapes"),
        (["model.timm.num_classes=3"], "set model.num_classes instead"),
        (["model.timm.in_chans=1"], "three channels"),
        (["train.objective=mae", "model.num_classes=0"], "train.objective = mae works on the patches"),
        (["optimizer.kind=muon"], "optimizer.kind = muon is for the matrices"),
        (["model.name=timm/no such"], "is no name of timm"),
        (["model.name=timm/swin_tiny_patch4_windw7_224"], "did you mean 'timm/swin_tiny_patch4_window7_224'"),
        (["model.timm.nonsense=3"], "nonsense"),
        (["model.name=timm/mixer_s16_224", "model.image_size=8"], "model.image_size = 8"),
        (["model.timm.init_values=0.1"], ""),
    ],
)
def test_what_means_nothing_is_refused_in_a_sentence(train_arguments, tmp_path, capsys, settings, sentence):
    own = [*OWN, *named("vit"), *settings]
    code = main([*train_arguments(tmp_path / "run", *own), "--dry-run"])
    told = capsys.readouterr()
    assert code == (2 if sentence else 0), told.err + told.out
    assert sentence in told.err and told.err.count("\n") <= 4


def test_evaluation_gives_what_timm_gives_on_the_same_pixels(run, digits):
    config = load_config(
        "quickstart", [f"data.eval={digits}/eval-*.tar", *OWN, f"data.eval={digits}/eval-*.tar"]
    ).config
    batches = list(eval_streams(config).eval_batches(config, rank=0, world_size=1, batch_size=50, pin_memory=False))
    theirs = timm.create_model("test_efficientnet", num_classes=10)
    theirs.load_state_dict(load_file(run / "model.safetensors"))
    theirs.eval()
    right = counted = 0.0
    for batch in batches:
        images, labels = (part[batch.weights > 0] for part in (batch.images, batch.labels))
        with torch.no_grad():
            logits = theirs((images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5)
        right += importlib.import_module("timm.utils").accuracy(logits, labels, topk=(1,))[0].item() * len(labels) / 100
        counted += len(labels)
    accuracy = evaluate(load_model(run), f"{digits}/eval-*.tar", config="quickstart")
    assert accuracy.samples == counted == 359 and accuracy.top1 == pytest.approx(right / counted, abs=1e-9)


def test_weights_are_written_for_timm_alone(run, tmp_path, capsys):
    assert main(["convert", str(run), str(tmp_path / "b.npz"), "--to", "npz"]) == 2
    assert "write --to timm" in capsys.readouterr().err
    assert main(["convert", str(run), str(tmp_path / "net.safetensors"), "--to", "timm", "--ema"]) == 0
    scope: dict = {}
    exec(textwrap.dedent(capsys.readouterr().out.partition("to load it:\n")[2]), scope)
    ours = load_model(run, ema=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(scope["model"].eval()(images), ours(images))
    assert json.loads((run / "environment.json").read_text())["accelerated"].endswith("modules fused")


def test_without_timm_the_sentence_says_how_to_install_it(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "timm" else found(name, *rest))
    with pytest.raises(UserError, match=r"pip install 'fastvit-engine\[integrations\]'"):
        import_timm()


def test_the_planner_says_that_it_has_measured(capsys):
    settings = [word for key in ("width", "depth", "heads") for word in ("--set", f"model.{key}=null")]
    arguments = ["plan", "quickstart", "--gpus", "2", "--set", "model.name=timm/test_vit", *settings]
    assert main([*arguments, "--set", "model.image_size=32"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("timm/test_vit, 0.3 M parameters") and "that of activations was measured" in told
    assert main([*arguments, "--set", "model.image_size=32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["flops_per_image"] > 1e6
