"""`load_model`: the same model from everything that holds one."""

import json
import shutil
import textwrap

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastvit_engine.checkpoint.export import export_weights, find_checkpoint
from fastvit_engine.checkpoint.load import load_model
from fastvit_engine.cli import main
from fastvit_engine.errors import UserError
from tests.kernels.integrations.conftest import TORCHVISION  # lets timm be imported

pytest.importorskip("timm", reason="timm is not installed")
assert TORCHVISION is None or TORCHVISION.ns == "torchvision"

DESCRIBED = ("class_names", "image_size", "mean", "std", "timm")
PIXELS = ["data.mean=[0.4, 0.5, 0.6]", "data.std=[0.2, 0.3, 0.4]"]


@pytest.fixture(scope="module")
def run(train, tmp_path_factory):
    """A run of two processes whose weights lie in shards, with an average and unusual pixels."""
    settings = ["train.precision=fp32", "train.duration=6 steps", "schedule.warmup=0 steps", "ema.decay=0.9"]
    settings += ["model.head=mlp", "model.layer_scale=0.1", "zero.stage=2", "data.eval_crop=0.9"]
    settings += ["data.eval_transform=big_vision", *PIXELS]
    return train(tmp_path_factory.mktemp("load") / "run", *settings, processes=2)


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("ema", [False, True])
def test_run_checkpoint_and_file_hold_the_same_model(run, tmp_path, ema):
    expected = load_file(run / ("model_ema.safetensors" if ema else "model.safetensors"))
    file = tmp_path / "exported.safetensors"
    export_weights(find_checkpoint(str(run)), file, "ema" if ema else "weight")
    checkpoint = run / "checkpoints" / "step-00000006"
    for model in (load_model(run, ema=ema), load_model(str(checkpoint), ema=ema), load_model(file)):
        found = weights_of(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        assert (model.config.head, model.config.layer_scale, model.training) == ("mlp", 0.1, False)
        pixels = (model.patch_embed.mean, model.patch_embed.std, model.eval_crop, model.eval_transform)
        assert pixels == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), 0.9, "big_vision")
        assert model(torch.zeros(2, 8, 8, 3, dtype=torch.uint8)).shape == (2, 10)


@pytest.mark.parametrize("ema", [False, True])
def test_export_prints_how_timm_loads_it_and_the_file_says_it_too(run, tmp_path, capsys, ema):
    out = tmp_path / "it's exported.safetensors"
    assert main(["export", str(run), "--out", str(out), *(["--ema"] if ema else [])]) == 0
    images, classes, heading, *code = capsys.readouterr().out.splitlines()[1:]
    assert images == (
        "images: 8 x 8 pixels, mean [0.4, 0.5, 0.6], std [0.2, 0.3, 0.4], eval_crop 0.9, eval_transform big_vision"
    )
    assert (classes, heading) == ("classes: 10 names", "in timm:")
    scope = {}
    exec(textwrap.dedent("\n".join(code)), scope)  # which loads the file strictly
    pixels = torch.arange(2 * 8 * 8 * 3, dtype=torch.uint8).view(2, 8, 8, 3)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    expected = load_model(out)(pixels)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(scope["model"].eval()(((pixels / 255 - mean) / std).permute(0, 3, 1, 2)), expected)
    for path in (out, run / "model.safetensors"):
        with safe_open(path, framework="pt") as file:
            metadata = {key: json.loads(file.metadata()[key]) for key in DESCRIBED}
        assert metadata["class_names"] == [str(digit) for digit in range(10)]
        assert (metadata["image_size"], metadata["mean"], metadata["std"]) == (8, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
        assert metadata["timm"] == textwrap.dedent("\n".join(code[:-2]))


@pytest.mark.parametrize(
    ("positions", "lacks"),
    [
        (["model.pos_embed=relative"], "relative positions ('blocks.0.attn.rel_pos_embed' and its like)"),
        (
            ["model.pos_embed=learned_2d", "model.pos_embed_at=every_layer", "zero.stage=3"],
            "a position table of columns and one of rows ('pos_embed_x', 'pos_embed_y')",
        ),
    ],
    ids=lambda value: str(value)[-15:],
)
def test_a_run_with_positions_that_timm_lacks_is_exported_for_this_program(train, tmp_path, capsys, positions, lacks):
    settings = ["train.duration=2 steps", "schedule.warmup=0 steps", *positions]
    run, out = train(tmp_path / "run", *settings), tmp_path / "x.safetensors"
    capsys.readouterr()
    assert main(["export", str(run), "--out", str(out)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"not in timm, whose models lack {lacks}: load it with fastvit_engine.load_model"
    model, exported = load_model(run), load_model(out)
    assert exported.config == model.config and "model.pos_embed=" + model.config.pos_embed == positions[0]
    assert all(torch.equal(exported.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    with safe_open(out, framework="pt") as file:
        assert "timm" not in file.metadata()


def forget_pixels(run):
    """Makes the checkpoint one of version 0.1.0."""
    path = run / "checkpoints" / "step-00000006" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["crc32"]  # earlier versions had none
    for key in ("pixels", "failed", "rewinds"):
        del manifest["state"][key]
    path.write_text(json.dumps(manifest))


def test_a_checkpoint_of_an_earlier_version_takes_its_pixels_from_the_run(run, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    copy.mkdir()
    for path in [run / "config.yaml", *(run / "checkpoints").rglob("*")]:
        target = copy / path.relative_to(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            target.write_bytes(path.read_bytes())
    forget_pixels(copy)
    for source in (copy, copy / "checkpoints" / "step-00000006"):
        model = load_model(source)
        assert (model.patch_embed.mean, model.eval_crop) == ((0.4, 0.5, 0.6), 0.9)
        assert model.eval_transform == "big_vision"
    path = copy / "config.yaml"
    path.write_text(path.read_text().replace("  eval_transform: big_vision\n", ""))
    assert load_model(copy).eval_transform == "fast"
    (copy / "config.yaml").unlink()
    with pytest.warns(UserWarning, match="does not say mean and std of its pixels"):
        assert load_model(copy / "checkpoints").patch_embed.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("text", ["", "checkpoint: [", "just words", "checkpoint: 3\ndata: 3\n", "\0"])
def test_a_run_whose_configuration_is_damaged_is_refused_in_a_sentence(run, tmp_path, text):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "config.yaml").write_text(text)
    message = r"^\S+/run/config\.yaml is empty or damaged: restore it, or move it away and give \S+/run/checkpoints "
    with pytest.raises(UserError, match=message):
        find_checkpoint(str(copy))
    forget_pixels(copy)
    with pytest.raises(UserError, match=message):
        load_model(copy / "checkpoints")
    (copy / "config.yaml").write_text("data: {}\n")  # sound, but it does not say what is needed of it
    with pytest.raises(UserError, match=message):
        load_model(copy)


def test_what_holds_no_model_is_named(run, tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint: give a run folder"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="/runs/typo does not exist: give a run folder"):
        load_model(tmp_path / "runs" / "typo")
    with pytest.raises(UserError, match=r"nothing.safetensors does not exist"):
        load_model(tmp_path / "nothing.safetensors")
    with pytest.raises(UserError, match="holds one set of weights"):
        load_model(run / "model.safetensors", ema=True)


def damaged_files(run, tmp_path):
    whole, path = load_file(run / "model.safetensors"), tmp_path / "model.safetensors"
    metadata = {"model": json.dumps({"name": "Ti/4", "image_size": 8, "num_classes": 10})}
    yield lambda: path.write_bytes((run / "model.safetensors").read_bytes()[:-4]), "not a complete safetensors file"
    yield lambda: path.write_bytes(b"\0" * 64), "not a complete safetensors file"
    yield lambda: save_file(whole, path), "does not say which model its weights are of"
    yield lambda: save_file(whole, path, {"model": "{"}), "has damaged metadata"
    yield lambda: save_file(whole, path, {"model": "[3]"}), "has damaged metadata"
    yield lambda: save_file(whole, path, {**metadata, "mean": "[0, 0, 0]"}), "has damaged metadata"
    yield lambda: save_file(whole, path, {"model": '{"shape": 3}'}), r"unknown|does not know \(model.shape"
    yield lambda: save_file(whole, path, metadata), r"parameter '\S+' is .* there and .* in the model"


def test_a_file_that_is_not_what_was_written_is_refused_in_a_sentence(run, tmp_path):
    for damage, message in damaged_files(run, tmp_path):
        damage()
        with pytest.raises(UserError, match=message):
            load_model(tmp_path / "model.safetensors")


def test_a_damaged_checkpoint_is_refused(run, tmp_path):
    copy = tmp_path / "step-00000006"
    copy.mkdir()
    for path in (run / "checkpoints" / "step-00000006").iterdir():
        content = bytearray(path.read_bytes())
        if path.suffix == ".safetensors":
            content[-3] ^= 1
        (copy / path.name).write_bytes(content)
    with pytest.raises(UserError, match="does not hold the bytes of parameter"):
        load_model(copy, ema=True)
