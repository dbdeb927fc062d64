"""Bad input, as a user meets it: one clear sentence on stderr, exit code 2, and nothing half-written."""

import io
import json
import os
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvit_engine.cli import main
from fastvit_engine.distributed.supervise import free_port, rank_environment
from fastvit_engine.observe.metrics import read_metrics
from tests.fastvit_engine.warm_ranks import exit_codes_of, run_ranks
from tests.in_full import in_full

MODEL = ["model.name=Ti/4", "model.image_size=8", "model.width=32", "model.depth=1", "model.heads=2"]
RUN = [
    *MODEL,
    "train.duration=4 steps",
    "train.global_batch_size=8",
    "schedule.warmup=0 steps",
    "data.num_workers=0",
    "data.eval=null",
    "evaluate.every=null",
    "checkpoint.every=null",
]


def png(seed=0):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path, labels, images=None):
    """A shard with one sample a label; `images` replaces the bytes of single samples."""
    with tarfile.open(path, "w") as tar:
        for number, label in enumerate(labels):
            members = {"png": (images or {}).get(number, png(number)), "cls": str(label).encode()}
            for extension, content in members.items():
                info = tarfile.TarInfo(f"sample{number:04d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shard(tmp_path):
    return write_shard(tmp_path / "train-000000.tar", [number % 10 for number in range(64)])


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def train_arguments(out, *settings, processes=1, resume="never"):
    arguments = ["train", "quickstart", "--out", str(out), "--cpu-processes", str(processes), "--resume", resume]
    return arguments + [word for setting in (*RUN, *settings) for word in ("--set", setting)]


@pytest.fixture
def refused(capfd):
    """Runs a command and checks that it is refused in one sentence that holds all the given parts."""

    def check(arguments, *parts):
        assert main([str(argument) for argument in arguments]) == 2
        errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fastvit: error:")]
        assert len(errors) == 1, errors
        for part in parts:
            assert str(part) in errors[0]

    return check


@pytest.fixture
def fails(tmp_path):
    """Runs a training of one process and checks that it ends with one sentence that holds all the given parts."""

    def check(arguments, *parts, before=None):
        log = tmp_path / "log"
        assert exit_codes_of(arguments, 1, log, before=before) == [2], log.read_text()
        (error,) = [line for line in log.read_text().splitlines() if line.startswith("fastvit: error:")]
        assert all(part in error for part in parts), error

    return check


@pytest.fixture
def train(tmp_path):
    """Runs a training of one process to its end, and returns what it printed."""

    def run(arguments):
        log = tmp_path / "log"
        assert run_ranks(arguments, 1, log), log.read_text()
        return log.read_text()

    return run


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        pytest.param(
            ["train.durration=1 epoch"], ["train.durration", "did you mean 'train.duration'"], id="unknown key"
        ),
        pytest.param(["optimizer.learning_rate=fast"], ["learning_rate", "'fast'", "number"], id="wrong type"),
        pytest.param(["train.duration=soon"], ["'soon' is not a duration"], id="no duration"),
        pytest.param(
            ["train.duration=2 epochs", "data.order=stream"], ["data.train_samples"], id="epochs of unknown length"
        ),
        pytest.param(["schedule.warmup=100 steps"], ["warm-up of 100", "4 steps"], id="warm-up longer than the run"),
        pytest.param(["model.name=XL/4"], ["'XL/4'", "sizes: Ti, S, B, L, H"], id="unknown model"),
        pytest.param(
            ["model.image_size=10"], ["model.image_size 10", "patch size 4"], id="image not divisible by patch"
        ),
        pytest.param(["model.heads=5"], ["model.heads 5", "model.width 32"], id="width not divisible by heads"),
        pytest.param(["data.train=null"], ["data.train is not set"], id="no shards given"),
        pytest.param(["data.train=nowhere-*.tar"], ["nowhere-*.tar", "matches no shards"], id="no shards match"),
        pytest.param(["data.train=nowhere-{0..3}.tar"], ["nowhere-0.tar", "does not exist"], id="a shard is missing"),
        pytest.param(
            ["data.order=stream", "data.streams=4"], ["1 shard for 4 parallel streams"], id="more streams than shards"
        ),
        pytest.param(["data.lanes=65"], ["data.lanes is 65", "64 samples"], id="more lanes than samples"),
        pytest.param(["data.image_key=tif"], ["'sample0000'", "no 'tif' member"], id="no such image member"),
        pytest.param(["data.label_key=txt"], ["'sample0000'", "no 'txt' member"], id="no such label member"),
        pytest.param(["data.index=gone.index"], ["no index gone.index"], id="no such index"),
        pytest.param(["data.train=[]"], ["data.train", "write at least 1"], id="no sources"),
        pytest.param(
            ["data.train=[{shards: x, weigth: 2}]"],
            ["unknown configuration key 'data.train.weigth'", "did you mean 'data.train.weight'"],
            id="source's key misspelt",
        ),
        pytest.param(["data.train=[{shards: x, weight: 0}]"], ["data.train.weight", "greater than 0"], id="no weight"),
        pytest.param(["data.train=2024"], ["data.train names the shard 2024"], id="shards are a number"),
        pytest.param(["train.precision=fp16"], ["fp16 needs a GPU"], id="fp16 without GPU"),
        pytest.param(["train.precision=fp8"], ["needs a Hopper GPU", "train.fp8.emulate=true"], id="fp8 without GPU"),
        pytest.param(["zero.stage=7"], ["zero.stage", "7"], id="no such ZeRO stage"),
        pytest.param(["zero.stage=1", "zero.offload=all"], ["needs zero.stage = 3"], id="offload at the wrong stage"),
        pytest.param(["deepspeed.zero_optimisation.stage=1"], ["did you mean"], id="DeepSpeed's key misspelt"),
        pytest.param(["deepspeed.optimizer.type=Lamb"], ["the 'optimizer' section"], id="DeepSpeed's key owned by us"),
    ],
)
def test_configuration(refused, shard, tmp_path, settings, parts):
    out = tmp_path / "run"
    refused(train_arguments(out, f"data.train={shard}", *settings), *parts)
    assert not out.exists()


def test_unknown_recipe(refused):
    refused(["train", "vit_h14_jfk"], "vit_h14_jfk", "did you mean 'vit_h14_jft'")


def test_more_processes_than_images(refused, shard, tmp_path):
    arguments = train_arguments(tmp_path / "run", f"data.train={shard}", "train.global_batch_size=1", processes=2)
    refused(arguments, "train.global_batch_size is 1, fewer images than the 2 processes: raise it, or train with fewer")


def test_no_processes(refused, shard, tmp_path):
    refused(train_arguments(tmp_path / "run", f"data.train={shard}", processes=0), "--cpu-processes is 0: at least 1")


def test_empty_shard(refused, tmp_path):
    empty = tmp_path / "train-000000.tar"
    empty.touch()
    refused(train_arguments(tmp_path / "run", f"data.train={empty}"), empty, "is an empty file")


def test_label_of_the_first_sample_out_of_range(refused, tmp_path):
    bad = write_shard(tmp_path / "train-000000.tar", [12])
    refused(train_arguments(tmp_path / "run", f"data.train={bad}"), "sample0000", bad, "label 12, outside 0..9")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        pytest.param("label", ["sample0020", "label 99, outside 0..9"], id="label out of range"),
        pytest.param("word", ["sample0020", "not a class index"], id="label is a word"),
        pytest.param("truncated", ["is truncated", "at byte"], id="truncated shard"),
    ],
)
def test_damaged_data(refused, tmp_path, damage, parts):
    labels = [number % 10 for number in range(32)]
    if damage in ("label", "word"):
        labels[20] = 99 if damage == "label" else "cat"
    shard = write_shard(tmp_path / "train-000000.tar", labels)
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    out = tmp_path / "run"
    refused(train_arguments(out, f"data.train={shard}", "train.duration=8 steps"), shard, *parts)
    assert_nothing_half_written(out)


def test_too_many_classes_in_the_dataset(refused, tmp_path):
    assert main(["data", "make", "digits", "--out", str(tmp_path / "digits")]) == 0
    arguments = train_arguments(tmp_path / "run", f"data.train={tmp_path}/digits", "model.num_classes=7")
    refused(arguments, "10 classes", "model.num_classes is 7")


def test_a_folder_that_already_holds_a_run(refused, train, shard, tmp_path):
    arguments = train_arguments(tmp_path / "run", f"data.train={shard}")
    train(arguments)
    refused(arguments, "already holds a run", "--resume auto", "--out")


@pytest.mark.parametrize(
    ("change", "processes", "parts"),
    [
        pytest.param("model.width=64", 1, ["belongs to another model (model.width is 64, was 32)"], id="another model"),
        pytest.param("seed=1", 1, ["written with seed 0 and this run has 1"], id="another seed"),
        pytest.param(
            "train.global_batch_size=16",
            2,
            ["written with train.global_batch_size 8 and this run has 16: set it back, or add --allow-batch-change"],
            id="another batch",
        ),
    ],
)
def test_resume_that_cannot_be(refused, train, shard, tmp_path, change, processes, parts):
    out = tmp_path / "run"
    train(train_arguments(out, f"data.train={shard}"))
    before = snapshot(out)
    longer = [f"data.train={shard}", "train.duration=6 steps", change]
    refused(train_arguments(out, *longer, processes=processes, resume="auto"), *parts)
    assert snapshot(out) == before


def test_a_corrupt_image_is_left_out_and_named_once(train, shard, tmp_path):
    write_shard(shard, [number % 10 for number in range(64)], {20: b"not an image"})
    out = tmp_path / "run"
    settings = [f"data.train={shard}", "train.duration=24 steps", "train.log_every=1"]
    printed = train(train_arguments(out, *settings))
    rows = read_metrics(out / "metrics.jsonl")[0]
    assert [rows[step - 1]["bad_samples"] for step in (8, 16, 24)] == [1, 2, 3]
    entries = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    assert [(entry["key"], entry["shard"]) for entry in entries] == [("sample0020", str(shard))]
    assert (
        json.loads((out / "checkpoints" / "step-00000024" / "manifest.json").read_text())["state"]["bad_samples"] == 3
    )
    assert printed.count("left out: sample 'sample0020'") == 1


def test_damaged_checkpoint(refused, fails, train, shard, tmp_path):
    out = tmp_path / "run"
    settings = f"data.train={shard}", "checkpoint.keep=1"  # not the one from before the first step
    train(train_arguments(out, *settings))
    weights = out / "checkpoints" / "step-00000004" / "rank-00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    arguments = train_arguments(out, *settings, "train.duration=6 steps", resume="auto")
    fails(arguments, str(weights), "has 1,000 bytes instead of", "parameter", "no older checkpoint to continue from")
    refused(["export", out, "--out", tmp_path / "x.safetensors"], weights, "has 1,000 bytes instead of")


def test_latest_names_no_checkpoint(refused, train, shard, tmp_path, capfd):
    out = tmp_path / "run"
    settings = f"data.train={shard}", "checkpoint.keep=1"  # not the one from before the first step
    train(train_arguments(out, *settings))
    (out / "checkpoints" / "latest").write_text("step-00000099")
    assert main(train_arguments(out, *settings, resume="auto")) == 0  # an older one is there, and complete
    assert (
        f"step-00000099 is not a complete checkpoint: going back to {out}/checkpoints/step-00000004"
        in capfd.readouterr().out
    )
    (out / "checkpoints" / "step-00000004").rename(tmp_path / "elsewhere")
    refused(train_arguments(out, *settings, resume="auto"), "step-00000099", "not a complete checkpoint")


def test_export_of_no_checkpoint(refused, tmp_path):
    out = ["--out", tmp_path / "x.safetensors"]
    no_checkpoint = "which holds no checkpoint"
    empty = f"{tmp_path} is an empty folder, {no_checkpoint}: give a run folder, or a checkpoint such as"
    refused(["export", tmp_path, *out], empty)
    refused(["evaluate", tmp_path, "--data", "x.tar"], empty)
    (tmp_path / "notes.txt").touch()
    refused(["export", tmp_path, *out], f"{tmp_path} holds no checkpoint: give a run folder")
    weights, convert = tmp_path / "hf", f"`fastvit convert {tmp_path}/hf NEW.safetensors --to timm`"
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    refused(["export", weights, *out], f"{weights} is a folder of weights (config.json), {no_checkpoint}: {convert}")
    (tmp_path / "w.npz").touch()
    refused(["export", tmp_path / "w.npz", *out], f"w.npz is a file of weights, {no_checkpoint}: `fastvit convert`")
    (tmp_path / "config.yaml").write_text("checkpoint: {path: null}")
    refused(["export", tmp_path, *out], f"{tmp_path} is a run without one: start the run again")
    step = tmp_path / "step-00000004"
    refused(["export", step, "--out", tmp_path / "x.safetensors"], step, "not a complete checkpoint")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["checkpoint.keep_best=top1"], ["checkpoint.keep_best", "'eval.top1'"]),
        (["checkpoint.keep_best=eval.top1"], ["needs an evaluation: set data.eval"]),
        (["checkpoint.keep_best=eval_ema.top1", "data.eval=SHARD"], ["needs an average of the weights: set ema.decay"]),
        (
            [
                *("checkpoint.keep_best=eval.loss", "data.eval=SHARD", "data.allow_overlap=true"),
                *("checkpoint.every=2 steps", "evaluate.every=3 steps"),
            ],
            ["let evaluate.every divide checkpoint.every"],
        ),
        (["checkpoint.path=nostore://bucket"], ["nostore://bucket cannot be opened"]),
    ],
)
def test_checkpoints_that_cannot_be_kept(refused, shard, tmp_path, settings, parts):
    settings = [setting.replace("SHARD", str(shard)) for setting in settings]
    refused(train_arguments(tmp_path / "run", f"data.train={shard}", *settings), *parts)


def test_read_only_output_folder(refused, shard, tmp_path):
    folder = tmp_path / "read-only"
    folder.mkdir()
    if os.geteuid() == 0:  # permissions do not bind root: a read-only file system does
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True).returncode != 0:
            pytest.skip("cannot mount a read-only file system here, and permissions do not bind root")
    else:
        folder.chmod(0o555)
    try:
        refused(train_arguments(folder / "run", f"data.train={shard}"), folder, "cannot be written", "--out")
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", folder], check=True)
        else:
            folder.chmod(0o755)


def test_output_folder_under_a_file(refused, shard):
    refused(train_arguments(shard / "run", f"data.train={shard}"), "cannot be written", "Not a directory")


def test_diverged_loss(fails, shard, tmp_path):
    settings = ["optimizer.learning_rate=1e30", "train.log_every=1", "train.grad_clip=null", "train.precision=fp32"]
    fails(
        train_arguments(tmp_path / "run", f"data.train={shard}", *settings), "the loss is", "at step", "learning_rate"
    )


def test_a_diverged_model_is_not_saved(fails, shard, tmp_path):
    settings = ["optimizer.learning_rate=1e30", "train.log_every=1000", "checkpoint.every=2 steps"]
    settings += ["train.grad_clip=null", "train.precision=fp32", "train.duration=6 steps"]
    fails(train_arguments(tmp_path / "run", f"data.train={shard}", *settings), "at step 2", "the loss is")
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000000"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000000"]


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        pytest.param({"RANK": "0"}, ["sets RANK but not LOCAL_RANK, WORLD_SIZE"], id="half an environment"),
        pytest.param(
            {"RANK": "3", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            ["RANK is 3 but WORLD_SIZE is 2"],
            id="rank out of range",
        ),
        pytest.param(
            {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"},
            ["MASTER_PORT is 'http', not an integer"],
            id="port is a word",
        ),
    ],
)
def test_wrong_launch_environment(fails, shard, tmp_path, variables, parts):
    """In a process of its own, which a rank that fails ends at once."""
    arguments = train_arguments(tmp_path / "run", f"data.train={shard}")
    fails(arguments, *parts, before=partial(replace_launch_environment, variables))


def replace_launch_environment(variables):
    for name in rank_environment(0, 1, 0):
        os.environ.pop(name, None)
    os.environ.update(variables)


def test_a_wrong_choice_of_kernels(shard, tmp_path):
    command = [sys.executable, "-m", "fastvit_engine", *train_arguments(tmp_path / "run", f"data.train={shard}")]
    environment = os.environ | {"FASTVIT_KERNELS": "cuda"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("fastvit: error:") == 1
    assert "environment variable FASTVIT_KERNELS must be one of auto, triton, reference, got 'cuda'" in done.stderr


@pytest.mark.parametrize("package", ["deepspeed", in_full("webdataset"), "tensorboard"])
def test_missing_package(shard, tmp_path, package):
    code = f"import sys; sys.modules[{package!r}] = None; from fastvit_engine.cli import main; sys.exit(main())"
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = os.environ | alone | {"MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", code, *train_arguments(tmp_path / "run", f"data.train={shard}")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("fastvit: error:") == 1
    assert "Traceback" not in done.stderr
    assert "pip install" in done.stderr
    assert package in done.stderr.lower()


def test_report_of_no_run(refused, tmp_path):
    refused(["report", tmp_path], tmp_path, "not a run folder")


def test_data_make_of_nothing(refused, tmp_path):
    refused(["data", "make", tmp_path / "nowhere", "--out", tmp_path / "shards"], "nowhere")
    (tmp_path / "empty").mkdir()
    refused(["data", "make", tmp_path / "empty", "--out", tmp_path / "shards"], "empty")
    assert not (tmp_path / "shards").exists()


def test_data_make_of_a_corrupt_image(refused, tmp_path):
    for number in range(4):
        path = tmp_path / "photos" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png() if number != 3 else b"no image")
    refused(["data", "make", tmp_path / "photos", "--out", tmp_path / "shards", "--eval-fraction", "0.5"], "3.png")
    assert not (tmp_path / "shards" / "dataset.json").exists()  # whole shards stay, for a run that goes on
    assert not list(tmp_path.rglob("*.tmp"))


def snapshot(folder: Path):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".writable"}


def assert_nothing_half_written(run: Path):
    leftovers = [path for path in run.rglob("*") if path.suffix in (".partial", ".tmp", ".removed")]
    assert not leftovers
    assert not (run / "checkpoints" / "latest").exists()
    assert not list((run / "checkpoints").glob("step-*"))
