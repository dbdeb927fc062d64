"""Official files: what they compute, whatever the layout, and what of a file is refused."""

import io
import resource
import time
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvit_engine import load_model
from fastvit_engine.checkpoint.load import open_model
from fastvit_engine.errors import UserError
from fastvit_engine.models.weights.npz import open_npz, write_npz
from fastvit_engine.models.weights.position import resample_positions
from tests.fastvit_engine.models.weights.official import big_vision, forward, random_arrays, save
from tests.kernels.integrations.conftest import TORCHVISION  # lets timm be imported

assert TORCHVISION is None or TORCHVISION.ns == "torchvision"
TABLE = "Transformer/posembed_input/pos_embedding"
POOL = {"attention_pool": True}
KINDS = {
    "class token": {},
    "mean": {"token": False},
    "tanh": {"tanh": True},
    "no head": {"classes": 0},
    "attention pooling": POOL,
    "pooling, tanh": {**POOL, "tanh": True},
}
WIDTHS = {  # of the paper's sizes, not deep
    "B/32": {"patch": 32, "width": 768, "heads": 12, "hidden": 3072, "depth": 2, "grid": 2},
    "L/16": {"patch": 16, "width": 1024, "heads": 16, "hidden": 4096, "depth": 1, "grid": 2},
    "H/14": {"patch": 14, "width": 1280, "heads": 16, "hidden": 5120, "depth": 1, "grid": 2},
}


def images_of(size, seed=1):
    return np.random.default_rng(seed).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)


def resampled(arrays, grid):
    """The arrays for another grid of patches."""
    if grid is None:
        return arrays
    table = torch.from_numpy(arrays[TABLE])
    return {**arrays, TABLE: resample_positions(table, grid, class_tokens=int("cls" in arrays)).numpy()}


def check_against_numpy(model, arrays, size):
    images = images_of(size)
    expected = forward(arrays, images)
    with torch.no_grad():
        theirs = torch.from_numpy(images).permute(0, 3, 1, 2)
        found = {
            "tokens": model.forward_features(theirs),
            "representation": model.represent(theirs),
            "logits": model(theirs),
        }
    assert np.abs(expected["logits"]).max() > 0.3
    for name, value in found.items():
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patch", [8, 14, 16, 32])
def test_a_file_computes_what_the_paper_says(tmp_path, kind, patch):
    arrays = random_arrays(patch=patch, **KINDS[kind])
    model = load_model(save(tmp_path / "x.npz", arrays))
    assert (model.config.activation, model.config.layer_norm_eps) == ("gelu_tanh", 1e-6)
    assert (model.config.image_size, model.patch_embed.mean, model.training) == (3 * patch, (0.5, 0.5, 0.5), False)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    check_against_numpy(model, arrays, 3 * patch)


@pytest.mark.parametrize(
    ("name", "kind"), [("B/32", "tanh"), ("L/16", "mean"), ("H/14", "class token"), ("B/32", "attention pooling")]
)
def test_at_the_widths_of_the_paper(tmp_path, name, kind):
    arrays = random_arrays(**WIDTHS[name], **KINDS[kind])
    model = load_model(save(tmp_path / "x.npz", arrays))
    assert model.config.name == name and model.config.width is model.config.heads is model.config.mlp_dim is None
    assert model.config.depth == WIDTHS[name]["depth"]
    check_against_numpy(model, arrays, model.config.image_size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [2, 5])
def test_at_another_resolution(tmp_path, kind, grid):
    arrays = random_arrays(**KINDS[kind])
    model = load_model(save(tmp_path / "x.npz", arrays), image_size=16 * grid)
    check_against_numpy(model, resampled(arrays, grid), 16 * grid)


@pytest.mark.parametrize("prefix", ["opt/target/", "params/"])
@pytest.mark.parametrize("stacked", [None, False, True], ids=["official", "big_vision", "stacked"])
@pytest.mark.parametrize("pool", ["token", "mean", "attention"])
def test_all_layouts_hold_the_same_model(tmp_path, prefix, stacked, pool):
    token = pool == "token"
    arrays = random_arrays(token=token, tanh=True, attention_pool=pool == "attention")
    stored = arrays if stacked is None else big_vision(arrays, stacked=stacked)
    path = save(tmp_path / "x.npz", stored, prefix)
    with_state = {prefix + name: array for name, array in stored.items()}
    np.savez(path, **with_state, **{"opt/state/step": np.float32(3), "extra/rng": np.float32([1, 2])})
    if stacked is not None:  # which adds no position to the class token
        arrays[TABLE][:, : int(token)] = 0
    check_against_numpy(load_model(path), arrays, 48)


def test_the_image_model_of_a_file_with_a_text_model(tmp_path):
    arrays = random_arrays(**POOL, classes=0)
    stored = {f"params/img/{name}": array for name, array in big_vision(arrays, stacked=True).items()}
    text = {f"params/txt/{name}": array for name, array in big_vision(random_arrays(seed=1), stacked=True).items()}
    np.savez(tmp_path / "x.npz", **stored, **text, **{"params/t": np.float32([2.3]), "params/b": np.float32([-10])})
    check_against_numpy(load_model(tmp_path / "x.npz"), arrays, 48)


def test_bfloat16_stored_as_two_bytes_is_read_exactly(tmp_path):
    arrays = random_arrays()
    rounded = {name: torch.from_numpy(array).bfloat16() for name, array in arrays.items()}
    void = {name: tensor.view(torch.int16).numpy().view("V2") for name, tensor in rounded.items()}
    path = save(tmp_path / "x.npz", void)
    assert np.load(path)["cls"].dtype == np.dtype("V2")
    expected = {name: tensor.float().numpy() for name, tensor in rounded.items()}
    check_against_numpy(load_model(path), expected, 48)


@pytest.mark.parametrize("change", [np.float16, np.float64, ">f4", "fortran", "compressed"])
def test_other_ways_to_store_numbers(tmp_path, change):
    arrays = random_arrays()
    if change == "compressed":
        np.savez_compressed(tmp_path / "x.npz", **arrays)
    elif change == "fortran":
        save(tmp_path / "x.npz", {name: np.asfortranarray(array) for name, array in arrays.items()})
    else:
        stored = {name: array.astype(change) for name, array in arrays.items()}
        save(tmp_path / "x.npz", stored)
        arrays = {name: array.astype(np.float32) for name, array in stored.items()}
    check_against_numpy(load_model(tmp_path / "x.npz"), arrays, 48)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_shape_is_read_as_it_is_written(tmp_path_factory, data):
    draw = data.draw
    heads, depth, grid = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    pool = draw(st.booleans())
    arrays = random_arrays(
        patch=draw(st.integers(1, 9)),
        heads=heads,
        width=heads * draw(st.integers(1, 9)),
        depth=depth,
        hidden=draw(st.integers(1, 40)),
        grid=grid,
        classes=draw(st.integers(0, 5)),
        token=draw(st.booleans()),
        tanh=draw(st.booleans()),
        attention_pool=pool,
        seed=draw(st.integers(0, 2**31)),
    )
    folder = tmp_path_factory.mktemp("shapes")
    model = load_model(save(folder / "x.npz", arrays))
    size = model.config.image_size
    expected = forward(arrays, images_of(size))["logits"]
    with torch.no_grad():
        found = model(torch.from_numpy(images_of(size)).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    write_npz(open_model(folder / "x.npz"), folder / "y.npz")
    # attention pooling is written as the one program that has it does
    same_arrays(big_vision(arrays, stacked=False) if pool else arrays, np.load(folder / "y.npz"))


def same_arrays(expected, found):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype == np.float32 and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize(
    ("kind", "layout"),  # timm has a position for the class token, and big_vision none
    [(kind, "official") for kind in ("class token", "mean", "no head", "attention pooling")]
    + [(kind, "big_vision") for kind in ("mean", "attention pooling")],
)
def test_equals_the_loader_of_timm_at_the_resolution_of_the_file(tmp_path, kind, layout):
    """At another one, timm's does not align the corners of the grids, as the authors' code does."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    arrays = random_arrays(width=192, hidden=768, heads=3, **KINDS[kind])
    path = save(tmp_path / "x.npz", arrays if layout == "official" else big_vision(arrays, stacked=True))
    arguments = {
        "mean": {"class_token": False, "global_pool": "avg", "fc_norm": False},
        "attention pooling": {"class_token": False, "global_pool": "map"},
    }.get(kind, {})
    theirs = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=48,
        num_classes=0 if kind == "no head" else 7,
        depth=2,
        act_layer="gelu_tanh",
        **arguments,
    ).eval()
    theirs.load_pretrained(str(path))
    ours = load_model(path)
    images = torch.from_numpy(images_of(48)).permute(0, 3, 1, 2)
    with torch.no_grad():
        torch.testing.assert_close(ours.forward_features(images), theirs.forward_features(images), rtol=0, atol=1e-5)
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-5)


def test_a_new_head_is_zero_and_the_tanh_layer_goes(tmp_path):
    path = save(tmp_path / "x.npz", random_arrays(tanh=True))
    images = torch.from_numpy(images_of(80)).permute(0, 3, 1, 2)
    model = load_model(path, 80, 3)
    assert (model.config.head, model.config.num_classes, model.config.image_size) == ("linear", 3, 80)
    assert not model(images).any() and model(images).shape == (2, 3)
    without = load_model(path, 80, 0)
    assert torch.equal(model.represent(images), without(images))
    torch.testing.assert_close(without(images), without.forward_features(images)[:, 0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 50}, "model.image_size 50 is not a multiple of the patch size 16"),
        ({"image_size": 0}, "image_size is 0: input should be greater than 0"),
        ({"num_classes": -1}, "num_classes is -1: input should be greater than or equal to 0"),
        ({"interpolation": "nearest"}, "interpolation is 'nearest': there are bilinear and bicubic"),
        ({"ema": True}, "holds one set of weights"),
        ({"name": "B/16"}, "says itself which model it is of: leave the name 'B/16' out"),
    ],
)
def test_changes_that_make_no_model_are_refused(tmp_path, arguments, message):
    path = save(tmp_path / "x.npz", random_arrays())
    with pytest.raises(UserError, match=message):
        load_model(path, **arguments)


# ---- what does not fit


def damages():
    yield {"head/extra": np.zeros(3, np.float32)}, r"array 'head/extra' is \[3\] there and absent in the model"
    yield {"head/bias": None}, r"array 'head/bias' is absent there and \[7\] in the model"
    yield {"head/bias": np.zeros(8, np.float32)}, r"array 'head/bias' is \[8\] there and \[7\] in the model"
    query = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel"
    yield {query: np.zeros((48, 16, 3), np.float32)}, rf"array '{query}' is \[48, 16, 3\] there and \[48, 3, 16\] in"
    yield {TABLE: np.zeros((1, 9, 48), np.float32)}, "has 9 positions, which are no square grid of patches and the cl"
    yield {TABLE: None}, f"has no array '{TABLE}', and is no Vision Transformer that this version knows"
    yield {TABLE: np.zeros((10, 48), np.float32)}, r"shape \[10, 48\], and must be \[1, positions, width\]"
    yield {"embedding/kernel": np.zeros((16, 16, 1, 48), np.float32)}, "'embedding/kernel' is no kernel for RGB images"
    yield {"embedding/kernel": np.zeros((16, 8, 3, 48), np.float32)}, "'embedding/kernel' is"
    probe = {"MAPHead_0/probe": np.zeros((1, 1, 48), np.float32)}
    yield probe, "has a class token, array 'cls', beside attention pooling, array 'MAPHead_0/probe'"
    lone = dict.fromkeys(random_arrays()) | random_arrays(token=False) | probe
    yield lone, "array 'MAPHead_0/MultiHeadDotProductAttention_0/query/kernel' is absent there and"
    pooled = dict.fromkeys(random_arrays()) | random_arrays(**POOL)
    yield pooled | {"MAPHead_0/probe": None}, r"array 'MAPHead_0/LayerNorm_0/scale' is \[48\] there and absent in the"
    yield pooled | {"MAPHead_0/probe": np.zeros((1, 2, 48), np.float32)}, r"'MAPHead_0/probe' is \[1, 2, 48\] there and"
    yield pooled | {"MAPHead_0/MlpBlock_0/Dense_1/bias": None}, "'MAPHead_0/MlpBlock_0/Dense_1/bias' is absent there"
    extra = {"MAPHead_0/LayerNorm_1/bias": np.zeros(48, np.float32)}
    yield pooled | extra, "'MAPHead_0/LayerNorm_1/bias' is .* and absent in"
    root = {"conv_root/kernel": np.zeros((7, 7, 3, 64), np.float32)}  # of a hybrid
    yield root, "array 'embedding/kernel' is no kernel for the 64 channels of its ResNet"
    resnet = {"resnet/root_block/standardized_conv2d/kernel": np.zeros((7, 7, 3, 64), np.float32)}
    yield dict.fromkeys(random_arrays()) | resnet, "has no blocks and 64 channels after the first convolution"
    yield {"cls": np.zeros((1, 1, 48), np.int32)}, "array 'cls' holds int32, and weights are floating-point"
    yield {"cls": np.zeros((1, 1, 48), "V4")}, r"array 'cls' holds \|V4, and weights are floating-point"
    yield {"cls": np.array([{}], dtype=object)}, "array 'cls' holds pickled Python objects, which are not read"
    yield {"Transformer/encoderblock/x": np.float32([1])}, "array 'Transformer/encoderblock_0/x' is .* and absent"
    yield {"Transformer/encoderblock/x": np.float32(1)}, "first axis of every array .* must be the number of blocks"


@pytest.mark.parametrize(("change", "message"), [*damages()])
def test_what_does_not_fit_is_named_with_both_shapes(tmp_path, change, message):
    arrays = {name: array for name, array in (random_arrays() | change).items() if array is not None}
    path = save(tmp_path / "x.npz", arrays)
    with pytest.raises(UserError, match=message) as refused:
        load_model(path)
    assert str(refused.value).startswith(str(path))


@pytest.mark.parametrize(
    ("dtype", "value", "said"),
    [("<f4", np.nan, "NaN"), ("<f2", -np.inf, "infinite"), ("<f8", 1e39, "infinite in float32")],
)
def test_numbers_that_are_not_finite_are_refused_by_the_name_of_their_array(tmp_path, dtype, value, said):
    arrays = {name: array.astype(dtype) for name, array in random_arrays().items()}
    name = "Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel"
    arrays[name][2, 1] = value
    with pytest.raises(UserError, match=rf"x.npz: array '{name}' holds .*{said}.*: the weights are broken"):
        load_model(save(tmp_path / "x.npz", arrays))


def npy_claiming(shape, dtype="<f4"):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def test_damaged_and_hostile_files_are_refused_in_bounded_time_and_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("fastvit_engine.models.weights.npz._SPARE", 2**22)  # so that a small bomb is one
    path = tmp_path / "x.npz"
    save(path, random_arrays())
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 1

    def archive(**members):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as out:
            for name, content in members.items():
                out.writestr(name.replace("__", "."), content)
        return buffer.getvalue()

    bomb = {f"a{number}__npy": npy_claiming((2**19,)) + bytes(2**21) for number in range(6)}
    contents = {
        "empty": b"",
        "cut": whole[:-200],
        "beginning": whole[:1000],
        "flipped": bytes(flipped),
        "words": b"hello" * 100,
        "npy": npy_claiming((3,)) + bytes(12),
        "gigantic": archive(embedding__npy=npy_claiming((2**60, 2**60))),
        "negative": archive(embedding__npy=npy_claiming((-1,))),
        "no arrays": archive(),
        "text": archive(readme__txt=b"hello"),
        "header": archive(embedding__npy=b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 60_000),
        "bomb": archive(**bomb),
    }
    for name, content in contents.items():
        path.write_bytes(content)
        start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(UserError, match=r"x\.npz") as refused:
            load_model(path)
        assert "\n" not in str(refused.value)
        assert time.monotonic() - start < 10, name
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, name  # KB


def test_an_archive_with_a_password_is_refused(tmp_path):
    path = save(tmp_path / "x.npz", random_arrays())
    content = bytearray(path.read_bytes())
    start = 0
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = content.find(mark)
        content[start + offset] |= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"is not a complete .npz file \(.*password required"):
        load_model(path)


# ---- writing


def test_what_breaks_the_convention_is_said_and_comes_back(tmp_path):
    model = open_npz(save(tmp_path / "x.npz", random_arrays()))
    assert write_npz(model, tmp_path / "same.npz") == []
    assert zipfile.ZipFile(tmp_path / "same.npz").comment == b""
    config = model.config.model_copy(update={"activation": "gelu", "layer_norm_eps": 1e-3})
    pixels = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5), "eval_crop": 0.9, "eval_transform": "fast"}
    names = tuple(f"class {number}" for number in range(7))
    other = model.__class__(model.where, config, model.shapes, model.load, pixels, names)
    notes = write_npz(other, tmp_path / "other.npz")
    assert [note.partition(", and ")[2] for note in notes] == [
        "this model has gelu",
        "this model has 0.001",
        "this model has [0.1, 0.2, 0.3]",
    ]
    again = open_npz(tmp_path / "other.npz")
    assert (again.config, again.pixels, again.class_names) == (config, pixels, names)
    same_arrays(random_arrays(), np.load(tmp_path / "other.npz"))
    many = model.__class__(model.where, config, model.shapes, model.load, pixels, ("long name",) * 10_000)
    assert "10,000 classes have no room" in write_npz(many, tmp_path / "many.npz")[-1]
    assert open_npz(tmp_path / "many.npz").class_names is None


def test_a_comment_of_somebody_else_is_passed_over(tmp_path):
    path = save(tmp_path / "x.npz", random_arrays())
    for comment in (b"hello", b"[1]", b'{"fastvit": 3}', b'{"other": {"activation": "gelu"}}'):
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = comment
        assert open_npz(path).config.activation == "gelu_tanh"
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b'{"fastvit": {"mean": [0.5, 0.5, 7], "std": [1, 1, 1]}}'
    with pytest.raises(UserError, match="has damaged metadata"):
        open_npz(path)


def test_equal_weights_are_equal_files(tmp_path):
    model = open_npz(save(tmp_path / "x.npz", random_arrays()))
    write_npz(model, tmp_path / "a.npz")
    write_npz(model, tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
