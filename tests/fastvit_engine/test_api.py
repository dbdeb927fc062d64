"""`import fastvit_engine`, as someone uses it who has just installed it."""

import inspect
import json
import os
import pydoc
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import webdataset as wds

import fastvit_engine
from fastvit_engine.config import ModelConfig, Resolved
from fastvit_engine.data.shards.index import write_index
from fastvit_engine.distributed.supervise import free_port
from fastvit_engine.errors import UserError
from fastvit_engine.objectives.classify import Classify
from fastvit_engine.observe.events import read_events
from fastvit_engine.observe.metrics import read_all_metrics, read_metrics
from fastvit_engine.observe.run_folder import RunFolder
from tests.fastvit_engine.conftest import TINY_RUN
from tests.fastvit_engine.train.steeper import Steeper
from tests.fastvit_engine.warm_rank import run_program
from tests.fastvit_engine.warm_ranks import exit_codes_of
from tests.in_full import in_full

SETTINGS = [*TINY_RUN, "train.precision=fp32", "train.duration=8 steps", "schedule.warmup=0 steps", "ema.decay=0.9"]


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_a_model_of_other_classes_is_refused(digits):
    config = ModelConfig(name="Ti/4", image_size=8, num_classes=10, width=32, depth=1, heads=2)
    model = fastvit_engine.build_model(config, mean=(0.5,) * 3, std=(0.5,) * 3)
    model.class_names = ("0", "1", "2", "4", "3", *"56789")
    with pytest.raises(UserError, match=r"class 3 is '4' in the model and '3' in the data: .*model.class_names = None"):
        fastvit_engine.evaluate(model, digits / "eval-000000.tar")
    model.class_names = None
    assert fastvit_engine.evaluate(model, digits / "eval-000000.tar").samples > 0


@pytest.fixture(scope="module")
def evaluated(digits):
    return [*SETTINGS, f"data.eval={digits}/eval-*.tar"]


def test_importing_the_package_imports_nothing_else():
    program = (
        "import sys, fastvit_engine; heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'deepspeed'} & sys.modules.keys(); "
        "assert not heavy, heavy; assert {'train', 'evaluate', 'load_model'} <= set(dir(fastvit_engine))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'fastvit_engine' has no attribute 'trian'"):
        fastvit_engine.trian  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'trian'"):
        from fastvit_engine import trian  # noqa: F401


def test_every_name_is_there_before_and_after_its_package_was_imported():
    program = """
import fastvit_engine
first = [callable(getattr(fastvit_engine, name)) for name in fastvit_engine.__all__]
import fastvit_engine.train.loop, fastvit_engine.evaluate.classification
from fastvit_engine import build_model, evaluate, load_config, load_model, train
assert all(first) and all(map(callable, (build_model, evaluate, load_config, load_model, train)))
assert fastvit_engine.train.loop.train is not train
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", fastvit_engine.__all__)
def test_every_name_says_what_it_does(name):
    function = getattr(fastvit_engine, name)
    assert function.__doc__
    assert inspect.signature(function).parameters
    assert "Raises UserError" in function.__doc__


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_help_on_a_package_that_can_be_called_shows_the_function(name):
    function = getattr(fastvit_engine.api, name)
    shown = pydoc.plain(pydoc.render_doc(getattr(fastvit_engine, name)))
    assert f"{name}{inspect.signature(function)}" in shown
    for line in filter(None, inspect.getdoc(function).splitlines()):
        assert line in shown
    assert inspect.signature(getattr(fastvit_engine, name)) == inspect.signature(function)


def test_build_model_takes_a_configuration_in_each_of_its_forms():
    resolved = fastvit_engine.load_config("quickstart", ["data.mean=[0.1, 0.2, 0.3]"])
    models = [fastvit_engine.build_model(config) for config in (resolved, resolved.config, resolved.config.model)]
    assert {model.config for model in models} == {resolved.config.model}
    means = [tuple(round(value, 6) for value in model.patch_embed.mean) for model in models]
    assert means == [(0.1, 0.2, 0.3), (0.1, 0.2, 0.3), (0.5, 0.5, 0.5)]


def test_train_then_load_then_evaluate(digits, evaluated, tmp_path, capsys):
    config = fastvit_engine.load_config("quickstart", [*evaluated, "data.eval_transform=big_vision"])
    before = dict(os.environ)
    fastvit_engine.train(config, tmp_path / "run", data=f"{digits}/train-*.tar")
    assert dict(os.environ) == before
    training, evaluations = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in training] == list(range(1, 9))
    out = tmp_path / "run"
    ending = f"finished {out}: top-1 {100 * evaluations[0]['top1']:.1f} % on 359 images\nnext: fastvit report {out}\n"
    assert capsys.readouterr().out.endswith(ending)
    for ema, row in enumerate(evaluations):
        model = fastvit_engine.load_model(tmp_path / "run", ema=bool(ema))
        accuracy = fastvit_engine.evaluate(model, f"{digits}/eval-*.tar", batch_size=50)
        assert (accuracy.samples, accuracy.top1) == (359, row["top1"])
        assert accuracy.loss == pytest.approx(row["loss"], abs=1e-5)
        assert not model.training


def test_a_run_can_be_continued_and_refused_in_one_process(digits, tmp_path):
    settings = [*SETTINGS, f"data.train={digits}/train-*.tar", "schedule.kind=constant"]
    config = fastvit_engine.load_config("quickstart", settings)
    fastvit_engine.train(config, tmp_path / "run")
    with pytest.raises(UserError, match="already holds a run: .*resume=True"):
        fastvit_engine.train(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"no shards|nowhere"):  # after which another run can begin
        fastvit_engine.train(config, tmp_path / "other", data=tmp_path / "nowhere")
    longer = fastvit_engine.load_config("quickstart", [*settings, "train.duration=10 steps", "zero.stage=3"])
    linear = torch.nn.functional.linear
    fastvit_engine.train(longer, tmp_path / "run", resume=True)
    assert torch.nn.functional.linear is linear
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")[0]] == list(range(1, 11))


def test_a_configuration_may_be_a_name_or_a_config(digits, tmp_path):
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        fastvit_engine.train("quickstrat", tmp_path / "run")
    config = fastvit_engine.load_config("quickstart", [*SETTINGS, "train.duration=1 step"]).config
    fastvit_engine.train(config, tmp_path / "run", data=digits / "train-000000.tar")
    assert fastvit_engine.load_model(tmp_path / "run").config.width == 32


def test_a_model_of_the_paper_is_built_and_evaluated_as_it_is(digits):
    config = ModelConfig(name="Ti/4", image_size=8, num_classes=10, width=32, depth=1, heads=2)
    model = fastvit_engine.build_model(config, mean=(0.5,) * 3, std=(0.5,) * 3)
    accuracy = fastvit_engine.evaluate(model.train(), digits / "eval-000000.tar")
    assert accuracy.loss == pytest.approx(2.302585, abs=1e-5)  # of a head that is zero
    assert model.training
    with pytest.raises(UserError, match=r"10 classes|label"):
        fastvit_engine.evaluate(
            fastvit_engine.build_model(config.model_copy(update={"num_classes": 3}), mean=(0.5,) * 3, std=(0.5,) * 3),
            digits / "eval-000000.tar",
        )


@pytest.fixture(scope="module")
def tiny():
    config = ModelConfig(name="Ti/4", image_size=8, num_classes=10, width=32, depth=1, heads=2)
    return fastvit_engine.build_model(config, mean=(0.5,) * 3, std=(0.5,) * 3)


def with_junk(write_tar, photo, path, good: int, junk: int) -> Path:
    """A shard of images, and then of samples that are none."""
    images = [photo(0)] * good + [b"junk"] * junk
    members = [pair for n, image in enumerate(images) for pair in ((f"{n}.jpg", image), (f"{n}.cls", b"1"))]
    return write_tar(path, members)


def test_evaluation_says_how_many_samples_it_leaves_out(tiny, write_tar, photo, tmp_path, capsys):
    shard = with_junk(write_tar, photo, tmp_path / "some.tar", 20, 9)  # too few to be too large a share
    assert fastvit_engine.evaluate(tiny, shard).samples == 20
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"left out: 9 of 29 samples; the first, sample '20' of shard {shard} ")


def test_evaluation_refuses_too_many_bad_samples(tiny, write_tar, photo, tmp_path):
    many = with_junk(write_tar, photo, tmp_path / "many.tar", 20, 20)
    tiny.train()
    with pytest.raises(UserError, match=r"20 of 40 samples .*max_bad_share = 0\.001 allows; the first, sample '20' of"):
        fastvit_engine.evaluate(tiny, many, batch_size=16)
    assert tiny.training
    tolerant = fastvit_engine.load_config("quickstart", ["data.max_bad_share=0.5"])
    assert fastvit_engine.evaluate(tiny, many, config=tolerant).samples == 20


def test_evaluation_refuses_samples_of_which_none_is_usable(tiny, write_tar, photo, tmp_path):
    junk = with_junk(write_tar, photo, tmp_path / "junk.tar", 0, 20)
    with pytest.raises(UserError, match=r"sample '0' of shard .*junk\.tar"):
        fastvit_engine.evaluate(tiny, junk)
    nothing = write_tar(tmp_path / "a.tar", [])
    with pytest.raises(UserError, match="hold no samples"):
        fastvit_engine.evaluate(tiny, nothing)
    with_junk(write_tar, photo, tmp_path / "b.tar", 0, 5)  # which is only seen when it is read
    with pytest.raises(UserError, match=r"none of 5 samples has a usable image; the first, sample '0' of .*b\.tar"):
        fastvit_engine.evaluate(tiny, f"{tmp_path}/[ab].tar")


@pytest.mark.parametrize("batch_size", [0, -3])
def test_evaluation_refuses_a_batch_size_that_is_none(tiny, digits, batch_size):
    with pytest.raises(UserError, match=rf"batch_size is {batch_size}: give"):
        fastvit_engine.evaluate(tiny, digits, batch_size=batch_size)


def test_evaluation_refuses_a_model_without_a_head(tmp_path):
    config = ModelConfig(name="Ti/4", image_size=8, width=32, depth=1, heads=2, num_classes=0)
    with pytest.raises(UserError, match="the model has no head .num_classes is 0., so it has no classes to measure"):
        fastvit_engine.evaluate(fastvit_engine.build_model(config), tmp_path)


def test_evaluation_takes_an_index_for_the_shards_in_it(tiny, digits, tmp_path):
    shards = sorted(map(str, digits.glob("eval-*.tar")))
    write_index(shards, tmp_path / "x.index", label_key="cls")
    assert fastvit_engine.evaluate(tiny, tmp_path / "x.index") == fastvit_engine.evaluate(tiny, f"{digits}/eval-*.tar")
    with pytest.raises(UserError, match=r"nowhere\.index"):
        fastvit_engine.evaluate(tiny, tmp_path / "nowhere.index")


def pipeline(digits):
    """A WebDataset pipeline of one's own over the digit scans, which yields pairs of image and label."""
    shards = sorted(str(path) for path in digits.glob("train-*.tar"))
    pairs = wds.WebDataset(shards, shardshuffle=False, empty_check=False).decode("pil").to_tuple("png", "cls")
    return pairs.map_tuple(lambda image: np.asarray(image.convert("RGB")), int)


def test_train_on_a_webdataset_pipeline(digits, tmp_path, capsys):
    config = fastvit_engine.load_config("quickstart", SETTINGS)
    fastvit_engine.train(config, tmp_path / "run", data=pipeline(digits))
    assert "reading an iterable of your own" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"data\.order iterable and this run has indexed: set it back"):
        fastvit_engine.train(config, tmp_path / "run", data=digits, resume=True)
    longer = fastvit_engine.load_config("quickstart", [*SETTINGS, "train.duration=10 steps"])
    fastvit_engine.train(longer, tmp_path / "run", data=pipeline(digits), resume=True)
    rows, _ = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_an_iterable_is_still_there_after_the_run_went_back(digits, tmp_path, monkeypatch):
    losses, calls = Classify.losses, iter(range(1000))
    monkeypatch.setattr(Classify, "losses", lambda *given: losses(*given) * (float("nan") if next(calls) == 5 else 1))
    shares = []

    def begin(share):
        shares.append(share)
        return pipeline(digits)

    fastvit_engine.train(fastvit_engine.load_config("quickstart", SETTINGS), tmp_path / "run", data=begin)
    assert [share.consumed for share in shares] == [0, 0]  # from the start, and from the checkpoint before any step
    assert [event["event"] for event in read_events(RunFolder(tmp_path / "run")) if event["event"] == "rewind"]
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")[0]][-1] == 8


def of_steps(steps: int, digits: Path, **settings: object) -> Resolved:
    settings = {f"train.{key}": value for key, value in settings.items()}
    fixed = [f"data.train={digits}/train-*.tar", f"train.duration={steps} steps", "schedule.kind=constant"]
    return fastvit_engine.load_config("quickstart", [*SETTINGS, *fixed, *(f"{k}={v}" for k, v in settings.items())])


def trained(run: Path) -> tuple[list[float], bytes]:
    """The losses of a run, and its weights."""
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl")[0]], (run / "model.safetensors").read_bytes()


def norm_of_head(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {"norm": model.head.weight.norm()}


@pytest.mark.distributed
def test_train_with_an_objective_of_ones_own(digits, tmp_path):
    """Given or named, on one process and on two, at once and resumed: the same losses; resumed, the same bits."""
    whole, parts, two = tmp_path / "whole", tmp_path / "parts", tmp_path / "two"
    path = "tests.fastvit_engine.train.steeper:Steeper"
    fastvit_engine.train(of_steps(4, digits), whole, objective=Steeper, evaluators={"head": norm_of_head})
    losses, weights = trained(whole)
    measured = read_all_metrics(whole / "metrics.jsonl").own
    assert [(row["step"], row["eval"]) for row in measured] == [(4, "head"), (4, "head_ema")]
    assert measured[0]["figures"]["norm"] > measured[1]["figures"]["norm"] > 0  # the average began with zeros
    assert losses[0] == pytest.approx(2 * np.log(10) + 0.5, abs=0.3) and len(losses) == 4  # a head of zeros

    recorded = fastvit_engine.load_config(str(whole / "config.yaml"))
    assert recorded.config.train.objective == json.loads((whole / "environment.json").read_text())["objective"] == path

    fastvit_engine.train(of_steps(2, digits, objective=path), parts)
    with pytest.raises(UserError, match=f"was trained with the objective {path}, and this run has classify: set"):
        fastvit_engine.train(of_steps(4, digits), parts, resume=True)
    fastvit_engine.train(of_steps(4, digits), parts, resume=True, objective=Steeper)
    assert trained(parts) == (losses, weights)

    settings = [*SETTINGS, f"data.train={digits}/train-*.tar", "train.duration=4 steps", "schedule.kind=constant"]
    settings = [word for setting in [*settings, f"train.objective={path}"] for word in ("--set", setting)]
    log = tmp_path / "log"
    assert exit_codes_of(["train", "quickstart", "--out", str(two), *settings], 2, log) == [0, 0], log.read_text()
    assert trained(two)[0] == pytest.approx(losses, rel=1e-5)


@pytest.mark.distributed
def test_each_rank_reads_its_own_share_of_an_iterable(tmp_path):
    program = """
import json, sys, numpy as np, fastvit_engine
def begin(share):
    print(share.rank, share.world_size, flush=True)
    return [(np.full((8, 8, 3), share.rank, np.uint8), share.rank)] * 64
settings = json.loads(sys.argv[1])
fastvit_engine.train(fastvit_engine.load_config("quickstart", settings), sys.argv[2], data=begin)
"""
    log = tmp_path / "log"
    run = partial(run_program, program, json.dumps(SETTINGS), str(tmp_path / "run"))
    assert exit_codes_of([], 2, log, before=run) == [0, 0], log.read_text()
    assert {"0 2", "1 2"} <= set(log.read_text().splitlines())


@pytest.mark.distributed
def test_train_is_one_rank_of_a_job_that_a_launcher_started(digits, tmp_path):
    program = (
        "import json, sys, fastvit_engine; "
        "fastvit_engine.train(fastvit_engine.load_config('quickstart', json.loads(sys.argv[1])), sys.argv[2])"
    )
    settings = json.dumps([*SETTINGS, f"data.train={digits}/train-*.tar"])
    log, out = tmp_path / "log", tmp_path / "run"
    run = partial(run_program, program, settings, str(out))
    assert exit_codes_of([], 2, log, before=run) == [0, 0], log.read_text()
    assert json.loads(Path(out, "environment.json").read_text())["world_size"] == 2


@pytest.mark.parametrize("zero_stage", [in_full(1), 3])
def test_a_program_ends_when_a_run_in_it_has_failed(digits, tmp_path, zero_stage):
    """The data workers end with the run, and PyTorch gets back what ZeRO-3 exchanges."""
    program = """
import json, multiprocessing, sys, torch, fastvit_engine
from fastvit_engine.errors import UserError
linear = torch.nn.functional.linear
try:
    fastvit_engine.train(fastvit_engine.load_config("quickstart", json.loads(sys.argv[1])), sys.argv[2])
except UserError as error:
    print(error)
assert not multiprocessing.active_children() and torch.nn.functional.linear is linear
"""
    failing = ["optimizer.learning_rate=1e30", "optimizer.weight_decay=0", "health.max_rewinds=0"]
    settings = [
        *SETTINGS,
        *failing,
        f"zero.stage={zero_stage}",
        "data.num_workers=1",
        f"data.train={digits}/train-*.tar",
    ]
    command = [sys.executable, "-c", program, json.dumps(settings), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "health.max_rewinds" in done.stdout


def test_a_process_group_of_the_user_is_left_alone(digits, tmp_path):
    port = free_port()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match="already belongs to a process group"):
            fastvit_engine.train("quickstart", tmp_path / "run", data=digits)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
