"""`fastvit train --dry-run`: what a start would do, and refuse, without a trace of it."""

import json
import shutil
import socket
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvit_engine.checkpoint import Manifest
from fastvit_engine.checkpoint.owner import own
from fastvit_engine.cli import main
from fastvit_engine.config import Config, load_config
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.train.start import preflight
from tests.fastvit_engine.conftest import TINY_RUN
from tests.fastvit_engine.test_bad_input import write_shard


@pytest.fixture(autouse=True)
def plain(monkeypatch, tmp_path):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "here").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


@pytest.fixture
def shards(tmp_path):
    """A folder of shards without an index, 64 samples of ten classes to train on and 20 to evaluate on."""
    folder = tmp_path / "here" / "shards"
    folder.mkdir()
    write_shard(folder / "train-000000.tar", [number % 10 for number in range(64)])
    write_shard(folder / "eval-000000.tar", [number % 10 for number in range(20)])
    return folder


@pytest.fixture
def dry_run(shards, capfd):
    """dry_run(settings..., options=...) -> what it prints; fails if it writes anything.

    refused: what is in the one sentence that it is to end with instead.
    """

    def run(*settings, options=(), refused=None, out="run"):
        everything = [f"data.train={shards}/train-*.tar", *TINY_RUN, *settings]
        words = [word for setting in everything for word in ("--set", setting)]
        before = trace()
        code = main(["train", "quickstart", "--out", out, "--dry-run", *options, *words])
        assert trace() == before and not list(Path(tempfile.tempdir).iterdir())
        printed, errors = capfd.readouterr()
        if refused is None:
            assert code == 0, errors
            return printed
        assert code == 2
        (line,) = errors.splitlines()
        assert line.startswith("fastvit: error: ") and refused in line, line
        assert printed == ""
        return None

    return run


def trace():
    """Everything in this folder, with times of change."""
    return {str(path): path.lstat().st_mtime_ns for path in Path().rglob("*")}


def test_it_shows_data_memory_split_and_the_command_of_a_rank(dry_run, shards):
    shown = dry_run(f"data.eval={shards}/eval-*.tar", options=["--cpu-processes", "2"])
    for part in (
        "dry run, nothing is written: 2 processes on 1 node, on CPU cores, as on this machine\n",
        "starting run: 20 steps, reading 64 samples",
        "  evaluation data: 20 samples in 1 shard\n",
        "no index for eval and train shards: made for this check and dropped",
        "memory per process: about ",
        "global batch  32 images = 2 processes x 16 images x 1 micro-batch\n",
        "# each process runs:\nexport ",
        "export OMP_NUM_THREADS=",
        "-m fastvit_engine train quickstart --out run --resume never --set ",
    ):
        assert part in shown


def test_a_job_elsewhere_is_sized_for_its_gpus(dry_run):
    job = ["--processes", "8:16", "--processes-per-node", "4", "--gpu", "A100"]
    shown = dry_run("train.precision=fp16", options=job)
    assert "8 to 16 processes on 2 to 4 nodes, one A100 (80 GiB) each, as assumed\n" in shown
    assert "global batch  32 images = 16 GPUs x 2 images" in shown
    assert "global batch  32 images = 8 GPUs x 4 images" in shown
    assert "if MFU is 40.0 % of 312 TFLOP/s per GPU (an assumption)" in shown
    assert "export" not in shown  # the launcher shows its own


def test_it_says_how_many_samples_a_subset_has(dry_run):
    shown = dry_run("data.subset=0.5", "train.duration=10 epochs")
    assert "starting run: 10 steps, reading 32 samples of 64 (data.subset)" in shown


@pytest.mark.parametrize(
    ("settings", "options", "sentence"),
    [
        (["data.subset=65"], [], "data.subset is 65, and data.train has 64 samples: lower it"),
        (["data.train=nowhere/*.tar"], [], "nowhere/*.tar"),
        (["data.eval=nowhere"], [], "nowhere, which does not exist"),
        (["evaluate.fewshot.train=a", "evaluate.fewshot.eval=b"], [], "a"),
        (["model.num_classes=5"], [], "label"),
        (["data.image_key=tif"], [], "no 'tif' member"),
        (["train.precision=fp16"], [], "fp16 needs a GPU"),
        (["init.from=missing.npz", "model.num_classes=10"], [], "missing.npz"),
        (["zero.stage=1", "zero.offload=all"], [], "needs zero.stage = 3"),
        (["train.global_batch_size=3"], ["--processes", "2:4"], "3, fewer images than the 4 processes"),
        (["data.order=stream", "data.streams=1"], ["--processes", "2"], "data.streams is 1"),
        (["schedule.warmup=100 steps"], [], "warm-up of 100"),
        (["train.profile.steps=25-30"], [], "train.profile.steps is 25-30, and the run has 20 steps"),
        (["checkpoint.path=shards/train-000000.tar/c"], [], "Not a directory"),
        (["train.profile.steps=19-21"], [], "19-21, and the run has 20 steps"),
        (
            ["train.profile={steps: 3-4, ranks: [3]}"],
            ["--processes", "2:4"],
            "ranks has 3, and the run has ranks 0 to 1",
        ),
    ],
)
def test_bad_input_is_one_sentence(dry_run, settings, options, sentence):
    dry_run(*settings, options=options, refused=sentence)


def test_a_recipe_that_does_not_exist_is_refused(capfd):
    assert main(["train", "quickstrt", "--dry-run"]) == 2
    assert "did you mean 'quickstart'" in capfd.readouterr().err


def test_a_run_folder_that_cannot_be_is_refused(dry_run):
    Path("file").touch()
    dry_run(out="file", refused="run folder file cannot be written (File exists): choose another one with --out")
    Path("gone").symlink_to("nowhere")
    dry_run(out="gone", refused="run folder gone cannot be written (File exists)")
    dry_run(out="n" * 300, refused="cannot be written (File name too long)")


def test_a_run_that_is_alive_is_not_touched(dry_run):
    with own(Config().checkpoint, RunFolder(Path("run")), {"FASTVIT_RUN_ID": "other"}):
        dry_run(refused="run folder run is in use by process")
        for record in Path("run").rglob("owner-1.json"):
            record.write_text(json.dumps(json.loads(record.read_text()) | {"machine": "another", "host": "node-7"}))
        assert "warning: run folder run belongs to process" in (shown := dry_run())
        assert "on node-7, since " in shown and "a start waits up to 75 s" in shown


@pytest.fixture
def stopped(shards):
    """A run folder with a checkpoint after two steps, of which only the state is there."""
    run = RunFolder(Path("run"))
    config = load_config("quickstart", [f"data.train={shards}/train-*.tar", *TINY_RUN, "zero.stage=1"]).config
    began = preflight(config, run, 1, resume=False)
    (run.checkpoints / "step-00000002").mkdir(parents=True)
    state = replace(began.state, step=2, consumed=64, seconds=1.0)
    (run.checkpoints / "step-00000002" / "manifest.json").write_bytes(Manifest(state, {}, {}, {}).to_json())
    (run.checkpoints / "latest").write_text("step-00000002")
    run.config.write_text("")
    return run


def test_what_would_be_resumed_is_named(dry_run, stopped):
    dry_run(refused="run already holds a run: add --resume auto")
    shown = dry_run("train.duration=9 steps", options=["--resume", "auto"])
    assert "continuing run from step 2 of 9, " in shown
    assert "  resumes from run/checkpoints/step-00000002\n" in shown
    assert "is complete, with 2 steps: nothing to do" in dry_run("train.duration=2 steps", options=["--resume"])
    dry_run("train.duration=9 steps", "seed=1", options=["--resume"], refused="written with seed 0 and this run has 1")
    shutil.rmtree("run/checkpoints/step-00000002")
    dry_run("train.duration=9 steps", options=["--resume"], refused="step-00000002")


def test_a_tracker_that_is_not_installed_is_refused_and_elsewhere_a_doubt(dry_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    dry_run("observe.trackers=[wandb]", refused="observe.trackers with wandb in it needs")
    shown = dry_run("observe.trackers=[wandb]", options=["--processes", "8", "--gpu", "H100"])
    assert "warning: on this machine, observe.trackers with wandb in it needs" in shown
    assert "; the node of rank 0 needs it\n" in shown


def test_a_port_that_is_taken_is_refused_and_on_several_nodes_a_doubt(dry_run):
    pytest.importorskip("prometheus_client", reason="needs prometheus_client: pip install prometheus-client")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        dry_run(f"observe.prometheus_port={port}", refused=f"port {port} of 127.0.0.1 cannot be used for Prometheus")
        several = ["--processes", "2", "--processes-per-node", "1"]
        shown = dry_run(f"observe.prometheus_port={port}", options=several)
        assert f"warning: on this machine, port {port} of 127.0.0.1 cannot be used" in shown
    assert "Prometheus" not in dry_run(f"observe.prometheus_port={port}")


def test_weights_of_something_else_are_refused(dry_run):
    np.savez("w.npz", **{"head/kernel": np.zeros((3, 3), np.float32)})
    dry_run("init.from=w.npz", "model.num_classes=10", refused="w.npz")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--processes", "2"], "--processes is of --dry-run: add that, or leave it out"),
        (["--gpu", "H100"], "--gpu is of --dry-run"),
        (["--dry-run", "--processes-per-node", "0"], "--processes-per-node is 0: at least 1"),
    ],
)
def test_options_of_a_dry_run_are_refused_if_they_mean_nothing(capfd, options, sentence):
    assert main(["train", "quickstart", *options]) == 2
    assert sentence in capfd.readouterr().err


def test_of_several_ranks_only_the_first_shows_anything(dry_run, monkeypatch):
    ranks = {"LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "1")
    assert dry_run() == ""
    monkeypatch.setenv("RANK", "0")
    assert "4 processes on 2 nodes" in dry_run()
    assert not torch.distributed.is_initialized()
