"""`fastvit convert`: there and back to the bit, code that loads what was written, nothing left of what is refused."""

import json
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastvit_engine import load_model
from fastvit_engine.checkpoint.load import open_model
from fastvit_engine.cli import main
from fastvit_engine.errors import UserError
from fastvit_engine.models.weights.convert import convert
from tests.fastvit_engine.models.weights.official import big_vision, random_arrays, save
from tests.kernels.integrations.conftest import TORCHVISION  # lets timm and transformers be imported

assert TORCHVISION is None or TORCHVISION.ns == "torchvision"
IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def converted(*words):
    assert main(["convert", *map(str, words)]) == 0


def refused(capsys, *words):
    """The sentence with which a command ends."""
    capsys.readouterr()
    assert main(["convert", *map(str, words)]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and len(lines) == 1 and lines[0].startswith("fastvit: error: ")
    return lines[0]


def run_code(capsys):
    """What the printed lines of Python make of the files."""
    code = capsys.readouterr().out.partition("to load it:\n")[2]
    scope = {}
    exec(textwrap.dedent(code), scope)
    return scope["model"].eval()


def same_arrays(expected, found):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].shape == array.shape and found[name].dtype == array.dtype
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize(
    ("between", "kind"),
    [
        ("timm", {}),
        ("timm", {"token": False}),
        ("timm", {"classes": 0}),
        ("hf", {}),
        ("hf", {"classes": 0}),
        ("hub-folder", {"token": False}),
        ("npz", {"tanh": True}),
    ],
    ids=str,
)
def test_there_and_back_every_array_is_the_same_to_the_bit(tmp_path, between, kind):
    arrays = random_arrays(**kind)
    arrays["embedding/bias"][:3] = [-0.0, 1e-45, 3e38]
    first, second = save(tmp_path / "first.npz", arrays), tmp_path / "second.npz"
    middle = tmp_path / {"timm": "x.safetensors", "npz": "x.npz"}.get(between, "folder")
    converted(first, middle, "--to", between)
    converted(middle, second, "--to", "npz")
    same_arrays(arrays, np.load(second))
    assert open_model(second).config == open_model(first).config


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("between", ["timm", "npz", "hub-folder"])
def test_attention_pooling_there_and_back(tmp_path, between, stacked):
    arrays = random_arrays(attention_pool=True)
    first = save(tmp_path / "first.npz", big_vision(arrays, stacked=stacked), "params/")
    middle = tmp_path / {"timm": "x.safetensors", "npz": "x.npz"}.get(between, "folder")
    converted(first, middle, "--to", between)
    converted(middle, tmp_path / "second.npz", "--to", "npz")
    same_arrays(big_vision(arrays, stacked=False), np.load(tmp_path / "second.npz"))
    assert open_model(tmp_path / "second.npz").config == open_model(first).config


def test_big_vision_becomes_the_official_layout(tmp_path, capsys):
    arrays = random_arrays()
    arrays["Transformer/posembed_input/pos_embedding"][:, 0] = 0  # the class token has no position there
    source = save(tmp_path / "first.npz", big_vision(arrays, stacked=True), "params/")
    converted(source, tmp_path / "second.npz", "--to", "npz")
    same_arrays(arrays, np.load(tmp_path / "second.npz"))
    with torch.no_grad():
        torch.testing.assert_close(run_code(capsys)(IMAGES), load_model(source)(IMAGES), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [{}, {"token": False}, {"classes": 0}, {"attention_pool": True}], ids=str)
def test_timm_loads_the_file_by_the_line_that_is_printed(tmp_path, capsys, kind):
    pytest.importorskip("timm", reason="timm is not installed")
    source, path = save(tmp_path / "x.npz", random_arrays(**kind)), tmp_path / "it's.safetensors"
    converted(source, path, "--to", "timm")
    model = run_code(capsys)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), load_model(path)(IMAGES), rtol=0, atol=1e-5)
        torch.testing.assert_close(model(IMAGES), load_model(source)(IMAGES), rtol=0, atol=1e-5)
    cfg = model.pretrained_cfg
    assert cfg["mean"] == cfg["std"] == [0.5] * 3 and cfg["interpolation"] == "bicubic"
    assert (cfg["input_size"], cfg["crop_pct"]) == ([3, 48, 48], 0.875)


@pytest.mark.parametrize("kind", [{}, {"token": False}, {"classes": 0}, {"attention_pool": True}], ids=str)
def test_timm_loads_the_folder_of_a_model_page(tmp_path, capsys, kind):
    pytest.importorskip("timm", reason="timm is not installed")
    source, folder = save(tmp_path / "x.npz", random_arrays(**kind)), tmp_path / "page"
    converted(source, folder, "--to", "hub-folder")
    model, ours = run_code(capsys), load_model(folder)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), ours(IMAGES), rtol=0, atol=1e-5)
    assert ours.config == load_model(source).config
    card = (folder / "README.md").read_text()
    header = card.split("---\n")[1]
    assert "library_name: timm\n" in header and card.split("---\n")[0] == ""
    task = "image-feature-extraction" if kind.get("classes") == 0 else "image-classification"
    assert f"pipeline_tag: {task}\n" in header
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}


def test_a_folder_of_timm_with_registers_there_and_back(tmp_path, capsys):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    given = {"img_size": 28, "depth": 2, "num_classes": 3}
    theirs = timm.create_model("vit_small_patch14_reg4_dinov2", **given).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path / "page"
    folder.mkdir()
    save_file(theirs.state_dict(), folder / "model.safetensors")
    config = {"architecture": "vit_small_patch14_reg4_dinov2", "num_classes": 3, "global_pool": "token"}
    config |= {"model_args": given, "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "config.json").write_text(json.dumps(config))
    images, ours = torch.randn(2, 3, 28, 28), load_model(folder)
    assert ours.config.registers == 4
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-5)
    converted(folder, tmp_path / "again", "--to", "hub-folder")
    again = run_code(capsys).state_dict()
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in theirs.state_dict().items())
    for target, name in (("npz", "y.npz"), ("hf", "y")):
        message = refused(capsys, folder, tmp_path / name, "--to", target)
        assert "has register tokens ('reg_token'), " in message and message.endswith("write --to timm")
    (folder / "config.json").write_text(json.dumps(config | {"architecture": "vit_small_patch16_224"}))
    message = refused(capsys, folder, tmp_path / "y.npz", "--to", "npz")
    assert "has register tokens with a position (no no_embed_class), and ours have none" in message


def test_a_folder_of_timm_is_read_without_our_metadata(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    folder = tmp_path / "page"
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=48, depth=2, num_classes=3, init_values=0.1, act_layer="gelu_tanh"
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 3,
        "global_pool": "token",
        "model_args": {"img_size": 48, "depth": 2, "init_values": 0.1, "act_layer": "gelu_tanh"},
        "pretrained_cfg": {
            "mean": [0.1, 0.2, 0.3],
            "std": [0.5, 0.5, 0.5],
            "crop_pct": 0.9,
            "interpolation": "bicubic",
        },
        "label_names": ["a", "b", "c"],
    }
    folder.mkdir()
    save_file(theirs.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    ours = load_model(folder)
    with torch.no_grad():
        torch.testing.assert_close(ours(IMAGES), theirs(IMAGES), rtol=0, atol=1e-5)
    assert ours.patch_embed.mean == (0.1, 0.2, 0.3) and (ours.eval_crop, ours.eval_transform) == (0.9, "timm")
    assert open_model(folder).class_names == ("a", "b", "c")
    for changes, message in [
        ({"model_args": {"qk_norm": True}}, "model_args has 'qk_norm', which this version does not know"),
        ({"architecture": "resnet50"}, "'resnet50' names no model that this version knows"),
        ({"architecture": "vit_base_patch16_clip_224"}, "names no model that this version knows"),
        ({"architecture": "vit_small_patch16_224"}, r"parameter 'cls_token' is \[1, 1, 192\] there and \[1, 1, 384\]"),
        ({"global_pool": "avg"}, r"is said to pool 'avg', and has the parameters of 'token'"),
        ({"global_pool": "map"}, r"is said to pool 'map', and has the parameters of 'token'"),
        ({"model_args": {"act_layer": "quick_gelu"}}, "has the activation 'quick_gelu'"),
        ({"model_args": {"depth": "many"}}, "model_args makes no model"),
        ({"pretrained_cfg": 3}, "has no pretrained_cfg and model_args of timm"),
    ]:
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=message):
            load_model(folder)


@pytest.mark.parametrize("target", ["npz", "timm", "hf", "hub-folder"])
def test_positions_that_the_target_lacks_are_named(tmp_path, write_model, capsys, target):
    destination = tmp_path / {"npz": "x.npz", "timm": "x.safetensors"}.get(target, "x")
    for model, named in [
        ({"pos_embed": "learned_2d"}, "a position table of columns and one of rows ('pos_embed_x', 'pos_embed_y')"),
        ({"pos_embed": "relative"}, "relative positions ('blocks.0.attn.rel_pos_embed' and its like)"),
        ({"pos_embed_at": "every_layer"}, "every layer ('pos_embed', each with rows of its own)"),
        ({"pos_embed_at": "shared"}, "every layer ('pos_embed', the same for all)"),
    ]:
        message = refused(capsys, write_model(**model), destination, "--to", target)
        assert f"{named}, for which " in message and " has no room: " in message
    if target in ("npz", "hf"):
        message = refused(capsys, write_model(pos_embed="none"), destination, "--to", target)
        assert "has no position table ('pos_embed'), which " in message and "write --to timm" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", [{}, {"registers": 2}, {"pool": "gap"}], ids=str)
def test_a_model_without_positions_in_timm_and_back(tmp_path, write_model, capsys, model):
    pytest.importorskip("timm", reason="timm is not installed")
    source, images = write_model(pos_embed="none", **model), torch.randn(2, 3, 8, 8)
    expected = load_model(source)
    for name, target in (("x.safetensors", "timm"), ("page", "hub-folder")):
        capsys.readouterr()
        converted(source, tmp_path / name, "--to", target)
        with torch.no_grad():
            torch.testing.assert_close(run_code(capsys)(images), expected(images), rtol=0, atol=1e-5)
    page = tmp_path / "page"
    save_file(load_file(page / "model.safetensors"), page / "model.safetensors")  # without our metadata
    again = load_model(page)
    assert again.config.pos_embed == "none" and again.config.image_size == 8
    assert all(torch.equal(again.state_dict()[name], t) for name, t in expected.state_dict().items())
    config = json.loads((page / "config.json").read_text())
    config["model_args"]["pos_embed"] = "rope"
    (page / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="model_args has pos_embed 'rope'"):
        load_model(page)


@pytest.mark.parametrize("name", ["Ti/16", "ViT-Ti/16", "vit_tiny_patch16_224", "vit_tiny_patch16_384.augreg_in21k"])
@pytest.mark.filterwarnings("ignore:.*does not say mean and std")
def test_weights_with_timms_names_need_the_name_of_the_model(tmp_path, name, capsys):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32).eval()
    path = tmp_path / "x.safetensors"
    save_file(theirs.state_dict(), path)
    assert "name the model, as in --name B/16" in refused(capsys, path, tmp_path / "y.npz", "--to", "npz")
    converted(path, tmp_path / "y.npz", "--to", "npz", "--name", name)
    images = IMAGES[..., :32, :32]
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "y.npz")(images), theirs(images), rtol=0, atol=1e-5)
        torch.testing.assert_close(load_model(path, name=name)(images), theirs(images), rtol=0, atol=1e-5)
    message = refused(capsys, path, tmp_path / "z.npz", "--to", "npz", "--name", "B/16")
    assert "parameter 'cls_token' is [1, 1, 192] there and [1, 1, 768] in the model" in message


def test_another_resolution_and_no_head(tmp_path):
    source = save(tmp_path / "x.npz", random_arrays(tanh=True))
    words = ["--to", "timm", "--head", "none", "--image-size", "80", "--interpolation", "bicubic"]
    converted(source, tmp_path / "x.safetensors", *words)
    found, expected = load_model(tmp_path / "x.safetensors"), load_model(source, 80, 0, "bicubic")
    assert found.config == expected.config and found.config.num_classes == 0
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in expected.state_dict().items())
    assert not torch.equal(load_model(source, 80, 0).pos_embed, found.pos_embed)


@pytest.fixture(scope="module")
def run(train, tmp_path_factory):
    settings = ["train.duration=2 steps", "schedule.warmup=0 steps", "ema.decay=0.9", "data.eval_crop=0.8"]
    settings += ["data.eval_transform=timm", "data.mean=[0.4, 0.5, 0.6]", "data.std=[0.2, 0.3, 0.4]"]
    return train(tmp_path_factory.mktemp("convert") / "run", *settings)


@pytest.mark.parametrize("target", ["npz", "timm", "hf", "hub-folder"])
def test_what_a_model_says_of_itself_arrives(tmp_path, target, run, capsys):
    destination = tmp_path / {"npz": "x.npz", "timm": "x.safetensors"}.get(target, "x")
    converted(run, destination, "--to", target, "--ema")
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == (3 if target == "npz" else 0)  # the activation, mean and std
    model = open_model(destination)
    assert model.class_names == tuple(map(str, range(10)))
    expected = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "eval_crop": 0.8, "eval_transform": "timm"}
    assert model.pixels == expected
    original = load_model(run, ema=True)
    assert all(torch.equal(model.read(name), tensor) for name, tensor in original.state_dict().items())
    pixels = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    assert torch.equal(load_model(destination)(pixels), original(pixels))


def test_timms_cfg_holds_the_names_of_the_classes(tmp_path, capsys):
    names = {"id2label": {str(number): f"class {number}" for number in range(7)}}
    source, folder = save(tmp_path / "x.npz", random_arrays()), tmp_path / "hf"
    converted(source, folder, "--to", "hf")
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | names))
    converted(folder, tmp_path / "x.safetensors", "--to", "timm")
    assert "'label_names': ['class 0', " in capsys.readouterr().out
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["pretrained_cfg"])["label_names"] == list(names["id2label"].values())
    converted(folder, tmp_path / "page", "--to", "hub-folder")
    config = json.loads((tmp_path / "page" / "config.json").read_text())
    assert config["pretrained_cfg"]["label_names"][6] == "class 6"
    assert "class 0, class 1" in (tmp_path / "page" / "README.md").read_text()


@pytest.mark.parametrize("target", ["hf", "hub-folder"])
def test_every_output_gets_a_name_and_it_is_said(tmp_path, target):
    """transformers takes the number of classes from `id2label`."""
    model = replace(open_model(save(tmp_path / "x.npz", random_arrays())), class_names=("a", "b", "c"))
    notes = convert(model, tmp_path / "out", target).notes
    assert "the model has 7 outputs and the names of 3 classes: output n is called LABEL_n from n = 3 on" in notes
    named = ["a", "b", "c", "LABEL_3", "LABEL_4", "LABEL_5", "LABEL_6"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (list(config["id2label"].values()) if target == "hf" else config["pretrained_cfg"]["label_names"]) == named
    assert len(load_model(tmp_path / "out").class_names) in (3, 7)
    whole = replace(model, class_names=tuple("abcdefg"))
    assert not [note for note in convert(whole, tmp_path / "whole", target).notes if "names" in note]
    more = replace(model, class_names=tuple("abcdefghi"))
    assert "names of 9 classes: the last ones are left out" in convert(more, tmp_path / "more", target).notes[-1]
    assert load_model(tmp_path / "more")


# ---- what is refused


def misfits():
    tanh, token = random_arrays(tanh=True), random_arrays(token=False)
    yield tanh, "timm", "'pre_logits.fc.weight'.*: --head none leaves it and the head out, --to npz keeps both"
    yield tanh, "hub-folder", "'pre_logits.fc.weight'.*: --head none .*, --to npz keeps both"
    yield tanh, "hf", "'pre_logits.fc.weight'.*: --head none .*, --to npz keeps both"
    yield token, "hf", "has no class token .'cls_token'"
    yield random_arrays(attention_pool=True), "hf", "has attention pooling .'attn_pool.latent'.*--to timm, or --to npz"
    yield {**tanh, "head/bias": np.zeros(3, np.float32)}, "npz", r"array 'head/bias' is \[3\] there and \[7\] in the"


@pytest.mark.parametrize(("arrays", "target", "message"), [*misfits()])
def test_a_refused_conversion_names_the_parameter_and_leaves_nothing(tmp_path, capsys, arrays, target, message):
    import re

    source = save(tmp_path / "x.npz", arrays)
    destination = tmp_path / {"npz": "y.npz", "timm": "y.safetensors"}.get(target, "y")
    assert re.search(message, refused(capsys, source, destination, "--to", target))
    assert list(tmp_path.iterdir()) == [source]


def with_layer_scale(tmp_path):
    from fastvit_engine.models.weights.safetensors_file import model_metadata
    from tests.fastvit_engine.models.test_vit import MEAN, STD, small

    model = small(layer_scale=0.1)
    metadata = model_metadata(model.config.model_dump(mode="json"), {"mean": MEAN, "std": STD}, None, "here")
    save_file(model.state_dict(), tmp_path / "x.safetensors", metadata)
    return tmp_path / "x.safetensors"


def test_layer_scale_fits_timm_and_a_dinov2_without_head(tmp_path, capsys):
    source = with_layer_scale(tmp_path)
    assert "LayerScale ('blocks.0.ls1.gamma' and its like)" in refused(
        capsys, source, tmp_path / "y.npz", "--to", "npz"
    )
    assert "--head none writes a Dinov2Model" in refused(capsys, source, tmp_path / "y", "--to", "hf")
    converted(source, tmp_path / "y", "--to", "hf", "--head", "none")
    converted(tmp_path / "y", tmp_path / "z.safetensors", "--to", "timm")
    expected = load_file(source)
    found = load_file(tmp_path / "z.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert set(expected) - set(found) == {"head.weight", "head.bias"}


def test_an_epsilon_that_timms_configuration_cannot_hold(tmp_path, capsys):
    pytest.importorskip("timm", reason="timm is not installed")
    source, folder = save(tmp_path / "x.npz", random_arrays()), tmp_path / "hf"
    converted(source, folder, "--to", "hf")
    config = json.loads((folder / "config.json").read_text()) | {"layer_norm_eps": 1e-3}
    (folder / "config.json").write_text(json.dumps(config))
    message = refused(capsys, folder, tmp_path / "page", "--to", "hub-folder")
    assert "has model.layer_norm_eps 0.001, for which timm's configuration has no room" in message
    converted(folder, tmp_path / "x.safetensors", "--to", "timm")
    with torch.no_grad():
        torch.testing.assert_close(run_code(capsys)(IMAGES), load_model(folder)(IMAGES), rtol=0, atol=1e-5)


def test_bad_arguments_are_one_sentence(tmp_path, capsys):
    source = save(tmp_path / "x.npz", random_arrays())
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    (tmp_path / "text.yaml").write_text("model: {}")
    (tmp_path / "empty.npz").touch()
    (tmp_path / "empty.safetensors").touch()
    before = sorted(tmp_path.rglob("*"))
    npz = ["--to", "npz"]
    for words, message in [
        ([tmp_path / "gone.npz", tmp_path / "y.npz", *npz], "gone.npz does not exist"),
        ([tmp_path / "gone.safetensors", tmp_path / "y.npz", *npz], "gone.safetensors does not exist"),
        ([tmp_path / "gone", tmp_path / "y.npz", *npz], "gone does not exist: give a run folder"),
        ([tmp_path / "text.yaml", tmp_path / "y.npz", *npz], "is a file, and no .npz or .safetensors"),
        ([tmp_path / "empty.npz", tmp_path / "y.npz", *npz], "is not a complete .npz file"),
        ([tmp_path / "empty.safetensors", tmp_path / "y.npz", *npz], "is not a complete safetensors file"),
        ([full, tmp_path / "y.npz", *npz], "holds no checkpoint"),
        (["https://host/x.npz", tmp_path / "y.npz", *npz], "is on a server: download the file, and give its path"),
        ([source, tmp_path / "y", *npz], "y must end in .npz"),
        ([source, tmp_path / "y.npz", "--to", "timm"], "y.npz must end in .safetensors"),
        ([source, tmp_path / "no" / "y.npz", *npz], "no is no folder: make it first"),
        ([source, full, "--to", "hf"], "full exists, and --to hf writes a new folder"),
        ([source, source, "--to", "hub-folder"], "exists, and --to hub-folder writes a new folder"),
        ([source, source, *npz, "--head", "none"], "x.npz is MODEL itself, which would be replaced"),
        ([source, tmp_path / "y.npz", *npz, "--image-size", "50"], "model.image_size 50 is not a multiple of"),
        ([source, tmp_path / "y.npz", *npz, "--ema"], "holds one set of weights"),
        ([source, tmp_path / "y.npz", *npz, "--name", "B/16"], "says itself which model it is of"),
        ([source, "/proc/y.npz", *npz], "/proc/y.npz could not be written"),
    ]:
        assert message in refused(capsys, *words)
    assert sorted(tmp_path.rglob("*")) == before
