"""Runs that start somewhere, or of which a part learns: SGD, layer decay, linear probes, and `init.from`."""

import hashlib
import json
import math
import shutil
from itertools import product

import numpy as np
import pytest
import torch

from fastvit_engine import load_config, load_model
from fastvit_engine.checkpoint import Checkpoint, open_store
from fastvit_engine.checkpoint.reader import CheckpointReader
from fastvit_engine.cli import main
from fastvit_engine.config.model_shape import resolve_shape
from fastvit_engine.engine.protocol import ParameterSlice
from fastvit_engine.observe.events import read_events
from fastvit_engine.observe.metrics import read_metrics
from fastvit_engine.observe.run_folder import RunFolder
from tests.fastvit_engine.conftest import TINY_RUN
from tests.fastvit_engine.models.weights.official import big_vision, random_arrays
from tests.fastvit_engine.warm_ranks import run_ranks
from tests.in_full import in_full

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SHARD_EVERYTHING = "deepspeed.zero_optimization={stage3_param_persistence_threshold: 0, reduce_bucket_size: 5000}"
SHORT = ["train.duration=8 steps", "schedule.kind=constant", "schedule.warmup=1 step", "train.precision=fp32"]
SGD = ["optimizer.kind=sgd", "optimizer.learning_rate=0.1", "optimizer.weight_decay=1e-3"]
PROBE = ["optimizer.frozen=backbone", "ema.decay=0.9", "model.dropout=0.1", "model.drop_path=0.1"]


def rows(run):
    return read_metrics(run / "metrics.jsonl")[0]


def figures(run):
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"], row["samples_hash"]) for row in rows(run)]


def losses(run):
    return [row["loss"] for row in rows(run)]


def at_stage(stage):
    return [f"zero.stage={stage}", *([SHARD_EVERYTHING] if stage == 3 else [])]


def whole(run, step, kind="weight"):
    """All parameters of a checkpoint that it has of a kind, by name."""
    checkpoint = Checkpoint(open_store(str(run / "checkpoints")), f"step-{step:08d}")
    manifest = checkpoint.read_manifest()
    names = manifest.stored(kind)
    found = {name: torch.full((torch.Size(manifest.parameters[name]).numel(),), torch.nan) for name in names}
    slices = [ParameterSlice(name, 0, values) for name, values in found.items()]
    CheckpointReader(checkpoint, manifest).fill({kind: slices})
    return found


WORLDS = [(2, 3), in_full(1, 1), in_full(1, 2), in_full(1, 3), in_full(2, 0), in_full(2, 1), in_full(2, 2)]


@pytest.fixture(scope="module")
def alone(train, tmp_path_factory):
    """The losses of one process without ZeRO, by the settings of the run."""
    known = {}

    def measure(*settings):
        if settings not in known:
            run = train(tmp_path_factory.mktemp("alone") / "run", *SHORT, "zero.stage=0", *settings)
            known[settings] = losses(run)
        return known[settings]

    return measure


@pytest.mark.parametrize(("processes", "stage"), WORLDS)
def test_sgd_with_layer_decay_is_the_same_on_any_number_of_processes(train, alone, tmp_path, processes, stage):
    settings = [*SGD, "optimizer.layer_decay=0.75"]
    run = train(tmp_path / "run", *SHORT, *settings, *at_stage(stage), processes=processes)
    assert losses(run) == pytest.approx(alone(*settings), abs=1e-5)
    assert losses(run)[-1] < losses(run)[0]
    assert {row["lr"] for row in rows(run)} == {0.1}  # of the head


@pytest.mark.parametrize(("processes", "stage"), WORLDS)
def test_a_linear_probe_is_the_same_on_any_number_of_processes(train, alone, tmp_path, processes, stage):
    run = train(tmp_path / "run", *SHORT, *PROBE, *at_stage(stage), processes=processes)
    assert losses(run) == pytest.approx(alone(*PROBE), abs=1e-5)
    assert losses(run)[-1] < losses(run)[0]


@pytest.mark.parametrize(
    ("processes", "stage", "settings"),
    [
        (2, 3, [*PROBE, "train.precision=bf16", *SGD]),
        (1, 0, [*SGD, "optimizer.layer_decay=0.5"]),
        in_full(2, 1, [*PROBE, *SGD]),
        in_full(2, 0, [*PROBE, "train.precision=bf16"]),
        in_full(2, 2, [*SGD, "train.precision=bf16"]),
    ],
)
def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(train, tmp_path, processes, stage, settings):
    common = [*SHORT, *settings, *at_stage(stage)]
    uninterrupted = train(tmp_path / "whole", *common, processes=processes)
    for duration in ("train.duration=5 steps", "train.duration=8 steps"):
        train(tmp_path / "run", *common, duration, processes=processes, resume="auto")
    assert figures(tmp_path / "run") == figures(uninterrupted)
    for kind in ("weight", "momentum_buffer", "exp_avg", "ema"):
        ours, theirs = whole(tmp_path / "run", 8, kind), whole(uninterrupted, 8, kind)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), kind


def test_a_linear_probe_changes_no_bit_of_the_backbone_wherever_it_goes_on(train, tmp_path):
    """Weight decay, averages, precisions, stages and numbers of processes that come and go."""
    out, decay = tmp_path / "run", "optimizer.weight_decay=0.5"
    first = whole(train(out, *SHORT, *PROBE, decay, "train.duration=2 steps", "zero.stage=0"), 2)
    moves = [(4, 2, 3, "bf16"), (6, 1, 1, "bf16"), (8, 2, 2, "fp32")]
    for steps, processes, stage, precision in moves:
        settings = [f"train.duration={steps} steps", f"train.precision={precision}", *at_stage(stage)]
        train(out, *SHORT, *PROBE, decay, *settings, processes=processes, resume="auto")
    last, average = whole(out, 8), whole(out, 8, "ema")
    for name, values in first.items():
        changed = name.startswith("head.")
        assert torch.equal(last[name], values) is not changed, name
        assert torch.equal(average[name], values) is not changed, name
    assert whole(out, 8, "exp_avg").keys() == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ([], SGD, "holds the optimizer state of optimizer.kind = adamw, and this run has sgd: set it back"),
        (PROBE, PROBE[1:], "holds the optimizer state of optimizer.frozen = backbone, and this run has none"),
    ],
)
def test_another_optimizer_cannot_take_over_a_state(train, train_arguments, tmp_path, capsys, before, after, sentence):
    train(tmp_path / "run", *SHORT, *before, "train.duration=1 step")
    assert main(train_arguments(tmp_path / "run", *SHORT, *after, resume="auto")) == 2
    said = capsys.readouterr().err
    assert sentence in said and f"--init {tmp_path}/run/checkpoints/step-00000001" in said


# ---- init.from

OPEN = {"model.name", "model.width", "model.depth", "model.heads"}  # of the tiny run: what the weights say


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """Random weights in the official layout: patches of 4, a grid of 2 x 2 (8 pixels), 7 classes, a tanh layer."""
    path = tmp_path_factory.mktemp("weights") / "weights.npz"
    np.savez(path, **random_arrays(patch=4, width=24, depth=2, heads=2, hidden=40, grid=2, tanh=True))
    return path


@pytest.fixture(scope="module")
def pooled_npz(tmp_path_factory):
    """The same with attention pooling instead of the class token and the tanh layer, as big_vision has it."""
    path = tmp_path_factory.mktemp("pooled") / "weights.npz"
    arrays = random_arrays(patch=4, width=24, depth=2, heads=2, hidden=40, grid=2, attention_pool=True)
    np.savez(path, **big_vision(arrays, stacked=True))
    return path


@pytest.fixture(scope="module")
def finetune(digits, tmp_path_factory):
    """Runs a tiny fine-tuning: finetune(out, weights, *settings, processes=2, resume="auto")."""

    def run(out, weights, *settings, processes=1, resume="never"):
        given = [setting for setting in TINY_RUN if setting.partition("=")[0] not in {*OPEN, "model.image_size"}]
        given += [f"data.train={digits}/train-*.tar", "model.image_size=16", "model.num_classes=10", *SHORT, *settings]
        arguments = ["train", "finetune_photos", "--init", str(weights), "--out", str(out), "--resume", resume]
        arguments += [word for setting in given for word in ("--set", setting)]
        log = tmp_path_factory.mktemp("finetune") / "log"
        assert run_ranks(arguments, processes, log), log.read_text()
        return out

    return run


def test_finetuning_from_an_npz_at_twice_the_resolution(finetune, npz, tmp_path):
    """The first loss is that of a head of zeros; the shape, activation and statistics are those of the file."""
    run = finetune(tmp_path / "run", npz, "loss.label_smoothing=0", "augment.mixup=0", *at_stage(3), processes=2)
    assert rows(run)[0]["loss"] == pytest.approx(math.log(10), abs=1e-4)
    assert losses(run)[-1] < losses(run)[0]
    config = load_config(str(run / "config.yaml")).config
    model = load_model(str(run)).config
    assert config.model == model
    shape = resolve_shape(model)
    assert (shape.patch_size, shape.width, shape.depth, shape.heads, shape.mlp_dim) == (4, 24, 2, 2, 40)
    assert (model.image_size, model.num_classes, model.head, model.activation) == (16, 10, "linear", "gelu_tanh")
    start, source = whole(run, 0), load_model(str(npz), image_size=16, num_classes=10)
    for name, values in source.named_parameters():
        assert torch.equal(start[name], values.flatten()), name
    recorded = json.loads((run / "environment.json").read_text())["init"]
    assert recorded == {
        "from": str(npz),
        "kind": "npz",
        "file": str(npz),
        "sha256": hashlib.sha256(npz.read_bytes()).hexdigest(),
        "head": "new",
    }


@pytest.mark.parametrize(
    ("processes", "stage", "precision"),
    [
        (2, 3, "fp32"),
        *(in_full(w, s, p) for w, s, p in product((1, 2), (0, 1, 2, 3), ("fp32", "bf16"))),
    ],
)
def test_finetuning_is_the_same_on_any_number_of_processes(finetune, npz, tmp_path, processes, stage, precision):
    common = [f"train.precision={precision}", "model.drop_path=0"]  # which each process draws for itself
    alone = finetune(tmp_path / "alone", npz, "zero.stage=0", *common)
    run = finetune(tmp_path / "run", npz, *common, *at_stage(stage), processes=processes)
    assert losses(run) == pytest.approx(losses(alone), abs=1e-5 if precision == "fp32" else 0.02)
    for name, values in whole(alone, 0).items():  # whatever the model computes in
        assert torch.equal(whole(run, 0)[name], values), name


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        (3, ["optimizer.layer_decay=0.75"]),
        in_full(3, ["optimizer.frozen=backbone"]),
        in_full(1, ["optimizer.layer_decay=0.75"]),
    ],
)
def test_finetuning_a_model_with_attention_pooling(finetune, pooled_npz, tmp_path, stage, settings):
    """A linear probe learns the last linear layer alone; else the pooling learns too."""
    common = ["train.duration=4 steps", "model.drop_path=0", *settings]
    alone = finetune(tmp_path / "alone", pooled_npz, "zero.stage=0", *common)
    run = finetune(tmp_path / "run", pooled_npz, *common, *at_stage(stage), processes=2)
    assert losses(run) == pytest.approx(losses(alone), abs=1e-5)
    start, end, source = whole(run, 0), whole(run, 4), load_model(str(pooled_npz), image_size=16, num_classes=10)
    assert load_config(str(run / "config.yaml")).config.model.pool == "map"
    for name, values in source.named_parameters():
        assert torch.equal(start[name], values.flatten()), name
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    if "optimizer.frozen=backbone" in settings:
        assert changed == {"head.weight", "head.bias"}
    else:
        assert {"attn_pool.kv.weight", "attn_pool.mlp.fc2.weight", "head.weight", "blocks.0.attn.qkv.weight"} < changed


@pytest.mark.parametrize("optimizer", [[], in_full([*SGD, "zero.stage=1"])], ids=["adamw", "sgd"])
def test_a_resumed_finetuning_needs_its_weights_no_more_and_repeats_to_the_bit(finetune, npz, tmp_path, optimizer):
    weights = tmp_path / "weights.npz"
    shutil.copy(npz, weights)
    settings = ["ema.decay=0.9", "model.dropout=0.1", *optimizer]
    uninterrupted = finetune(tmp_path / "whole", weights, *settings)
    out = finetune(tmp_path / "run", weights, *settings, "train.duration=3 steps")
    before = json.loads((out / "environment.json").read_text())["init"]
    weights.unlink()
    finetune(out, weights, *settings, "train.duration=5 steps", resume="auto")
    finetune(out, tmp_path / "other.npz", *settings, resume="auto")
    assert figures(out) == figures(uninterrupted)
    for kind in ("weight", "momentum_buffer" if optimizer else "exp_avg", "ema"):
        ours, theirs = whole(out, 8, kind), whole(uninterrupted, 8, kind)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), kind
    assert json.loads((out / "environment.json").read_text())["init"] == before
    changed = [event for event in read_events(RunFolder(out)) if event["event"] == "configuration"]
    assert {"key": "init.from", "from": str(weights), "to": str(tmp_path / "other.npz")} in changed[-1]["changes"]


def test_a_run_starts_from_another_and_keeps_its_head(train, train_arguments, tmp_path):
    first = train(tmp_path / "first", *SHORT, "data.mean=[0.4, 0.5, 0.6]")
    keep = ["init.head=keep", f"init.from={first}", "optimizer.frozen=backbone", "zero.stage=2"]
    second = train(tmp_path / "second", *SHORT, *keep, processes=2)
    began, ended = whole(second, 0), whole(first, 8)
    assert all(torch.equal(began[name], ended[name]) for name in ended)
    assert losses(second)[0] < losses(first)[0] - 0.1
    assert load_config(str(second / "config.yaml")).config.data.mean == (0.4, 0.5, 0.6)
    recorded = json.loads((second / "environment.json").read_text())["init"]
    assert (recorded["kind"], recorded["head"]) == ("checkpoint", "keep")
    assert recorded["file"] == f"{first}/checkpoints/step-00000008/manifest.json"
