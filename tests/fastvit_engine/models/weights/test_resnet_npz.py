"""Official files of BiT and of hybrids: what they compute, whatever the layout; what is written; what is refused."""

import json

import numpy as np
import pytest
import torch

from fastvit_engine import load_model
from fastvit_engine.checkpoint.load import open_model
from fastvit_engine.cli import main
from fastvit_engine.errors import UserError
from fastvit_engine.models.weights.npz import write_npz
from tests.fastvit_engine.models.official_resnets import (
    bit_arrays,
    bit_big_vision,
    bit_forward,
    hybrid_arrays,
    hybrid_forward,
)
from tests.fastvit_engine.models.weights.official import save
from tests.kernels.integrations.conftest import TORCHVISION  # lets timm be imported

assert TORCHVISION is None or TORCHVISION.ns == "torchvision"
TABLE = "Transformer/posembed_input/pos_embedding"
HYBRIDS = {  # stages, cells of a patch, name
    "R": ((), 8, "R+Ti/16"),
    "R26": ((2, 2, 2, 2), 1, "R26+Ti/32"),
    "R50/16": ((3, 4, 9), 1, "R50+Ti/16"),
    "R50/32": ((3, 4, 6, 3), 1, "R50+Ti/32"),
}


def images_of(size, seed=1):
    return np.random.default_rng(seed).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)


def check(model, expected, images):
    theirs = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        found = {"representation": model.represent(theirs), "logits": model(theirs)}
    assert np.abs(expected["logits"]).max() > 0.3
    for name, value in found.items():
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=0, atol=1e-4, err_msg=name)


def refused(path):
    with pytest.raises(UserError) as error:
        open_model(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    return str(error.value).removeprefix(str(path))


# ---- hybrids


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("R", {}),
        ("R", {"flat": True, "token": False}),
        ("R26", {"tanh": True}),
        ("R50/16", {"flat": True}),
        ("R50/32", {"classes": 0}),
    ],
)
def test_a_hybrid_computes_what_the_authors_code_does(tmp_path, kind, settings):
    stages, cells, name = HYBRIDS[kind]
    arrays = hybrid_arrays(stages=stages, cells=cells, **settings)
    model = load_model(save(tmp_path / "x.npz", arrays, "opt/target/" if settings.get("flat") else ""))
    assert model.config.name == name
    assert (model.config.activation, model.config.layer_norm_eps) == ("gelu_tanh", 1e-6)
    assert (model.config.image_size, model.config.width, model.config.depth) == (2 * model.shape.patch_size, 48, 2)
    images = images_of(model.config.image_size)
    check(model, hybrid_forward(arrays, images, stages), images)


def test_a_hybrid_at_another_resolution(tmp_path):
    arrays = hybrid_arrays(stages=(), cells=8)
    model = load_model(save(tmp_path / "x.npz", arrays), image_size=96, num_classes=3)
    assert model.config.image_size == 96 and model.config.num_classes == 3
    with pytest.raises(UserError, match=r"image_size 80 is not a multiple of 32"):
        load_model(tmp_path / "x.npz", image_size=80)
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert model.forward_features(images).shape == (1, 10, 48) and not model(images).any()


@pytest.mark.parametrize("flat", [False, True])
def test_a_hybrid_is_written_as_published_files_are(tmp_path, flat):
    arrays = hybrid_arrays(stages=(), cells=8, flat=flat, tanh=True)
    assert write_npz(open_model(save(tmp_path / "x.npz", arrays)), tmp_path / "y.npz") == []
    found = np.load(tmp_path / "y.npz")
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].ravel().tobytes() == array.ravel().tobytes(), name
        assert found[name].shape == ((1, 1, 1, 64) if name.startswith("gn_root") else array.shape)


def test_hybrids_that_cannot_be(tmp_path):
    arrays = hybrid_arrays(stages=(2, 2, 2, 2), cells=1)
    path = tmp_path / "x.npz"

    def said(**changes):
        changed = {name: array for name, array in {**arrays, **changes}.items() if array is not None}
        return refused(save(path, changed))

    assert "array 'gn_root/scale' is absent there" in said(**{"gn_root/scale": None})
    message = said(**{"block2/unit1/conv2/kernel": np.zeros((3, 3, 128, 64), np.float32)})
    assert "array 'block2/unit1/conv2/kernel' is [3, 3, 128, 64] there" in message
    extra = {f"block1/unit4/{name.split('/', 2)[2]}": array for name, array in arrays.items()
             if name.startswith("block1/unit2/")}  # fmt: skip
    assert "blocks of its ResNet are missing" in said(**extra)
    extra = {name.replace("unit4", "unit3"): array for name, array in extra.items()}
    assert "a ResNet of 3, 2, 2, 2 blocks and 64 channels" in said(**extra)
    assert "is no kernel for the 2048 channels" in said(**{"embedding/kernel": np.zeros((1, 1, 1024, 48), np.float32)})
    cells = said(**{"embedding/kernel": np.zeros((2, 2, 2048, 48), np.float32)})
    assert "before patches of 2 x 2 cells, which is no hybrid that this version knows" in cells
    root = said(**{"conv_root/kernel": np.float32(1)})
    assert "array 'conv_root/kernel' has shape []" in root


# ---- BiT


@pytest.mark.parametrize("layout", ["first code", "numbered", "big_vision"])
def test_a_resnet_computes_what_the_authors_code_does(tmp_path, layout):
    arrays = bit_arrays()
    stored = {"first code": arrays, "numbered": bit_arrays(numbered=True), "big_vision": bit_big_vision(arrays)}[layout]
    path = save(tmp_path / "x.npz", stored, "params/" if layout == "big_vision" else "")
    model = load_model(path)
    assert (model.config.name, model.config.image_size, model.config.num_classes) == ("R50x1", 224, 7)
    images = images_of(37)
    check(model, bit_forward(arrays, images), images)


def test_a_resnet_is_written_in_the_first_layout(tmp_path):
    arrays = bit_arrays()
    model = open_model(save(tmp_path / "x.npz", arrays)).changed(image_size=480)
    assert write_npz(model, tmp_path / "y.npz") == []
    found = np.load(tmp_path / "y.npz")
    assert set(found) == set(arrays)
    assert all(found[name].tobytes() == array.tobytes() for name, array in arrays.items())
    assert open_model(tmp_path / "y.npz").config == model.config
    headless = load_model(tmp_path / "y.npz", num_classes=0)
    assert headless.config.num_classes == 0 and headless.config.image_size == 480
    new = load_model(tmp_path / "y.npz", num_classes=3)
    assert new.head.fc.weight.shape == (3, 2048, 1, 1) and not new.head.fc.weight.any()


def test_resnets_that_cannot_be(tmp_path):
    arrays, path = bit_arrays(), tmp_path / "x.npz"
    missing = {name: array for name, array in arrays.items() if "block3/unit06" not in name}
    assert "has 3, 4, 5, 3 blocks and 64 channels" in refused(save(path, missing))
    without = {name: array for name, array in arrays.items() if name != "resnet/block1/unit02/b/group_norm/gamma"}
    assert "'resnet/block1/unit02/b/group_norm/gamma' is absent there" in refused(save(path, without))
    name = "resnet/block2/unit01/a/proj/standardized_conv2d/kernel"
    assert f"array '{name}' holds NaN" in _unread(save(path, {**arrays, name: arrays[name] * np.float32("nan")}))


def _unread(path):
    with pytest.raises(UserError) as error:
        load_model(path)
    return str(error.value)


# ---- other programs


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An R50x1 of BiT and an R26+Ti/32, as official files."""
    folder = tmp_path_factory.mktemp("official")
    save(folder / "bit.npz", bit_arrays())
    save(folder / "hybrid.npz", hybrid_arrays(stages=(2, 2, 2, 2), cells=1))
    return folder


@pytest.mark.parametrize(("name", "size", "tolerance"), [("bit", 64, 1e-4), ("hybrid", 64, 3e-3)])
def test_in_timm(files, tmp_path, capsys, name, size, tolerance):
    pytest.importorskip("timm", reason="timm is not installed")
    path = tmp_path / "x.safetensors"
    assert main(["convert", str(files / f"{name}.npz"), str(path), "--to", "timm"]) == 0
    said = capsys.readouterr().out
    assert ("note: timm adds other small numbers" in said) == (name == "hybrid")
    scope = {}
    exec("\n".join(line.strip() if not line.startswith("        ") else line[4:]
                   for line in said.partition("to load it:\n")[2].splitlines()), scope)  # fmt: skip
    images = torch.from_numpy(images_of(size)).permute(0, 3, 1, 2)
    ours = load_model(path)
    with torch.no_grad():
        torch.testing.assert_close(scope["model"].eval()(images), ours(images), rtol=0, atol=tolerance)
        torch.testing.assert_close(load_model(files / f"{name}.npz")(images), ours(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "said"),
    [("bit", "'stem.conv.weight' and its like"), ("hybrid", "'patch_embed.backbone.stem.conv.weight' and its like")],
)
def test_transformers_has_no_room_for_convolutions(files, tmp_path, capsys, name, said):
    assert main(["convert", str(files / f"{name}.npz"), str(tmp_path / "x"), "--to", "hf"]) == 2
    assert f"has the convolutions of a ResNet ({said})" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["bit", "hybrid"])
def test_as_a_model_page_of_timm(files, tmp_path, name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    page = tmp_path / "page"
    assert main(["convert", str(files / f"{name}.npz"), str(page), "--to", "hub-folder"]) == 0
    images = torch.from_numpy(images_of(64)).permute(0, 3, 1, 2)
    ours, theirs = load_model(page), timm.create_model(f"local-dir:{page}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images), rtol=0, atol=3e-3)
    # without our metadata, as timm itself writes it
    from safetensors.torch import load_file, save_file

    save_file(load_file(page / "model.safetensors"), page / "model.safetensors")
    config = json.loads((page / "config.json").read_text())
    again = load_model(page)
    assert (
        again.config.name == ours.config.name and again.config.image_size == config["pretrained_cfg"]["input_size"][1]
    )
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("name", "names"),
    [("bit", ["R50x1", "resnetv2_50x1_bit.goog_in21k"]), ("hybrid", ["R26+Ti/32", "vit_tiny_r26_s32_224"])],
)
def test_weights_with_timms_names_need_a_name(files, tmp_path, name, names):
    """Of a hybrid, the size of the Transformer would be that of Ti: these weights are of another width."""
    from safetensors.torch import save_file

    model = load_model(files / f"{name}.npz")
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    for known in names:
        if name == "bit":
            found = load_model(tmp_path / "x.safetensors", name=known)
            assert found.config.name == "R50x1" and found.config.num_classes == 7
        else:
            with pytest.raises(UserError, match=r"'cls_token' is \[1, 1, 48\] there and \[1, 1, 192\] in the model"):
                load_model(tmp_path / "x.safetensors", name=known)
