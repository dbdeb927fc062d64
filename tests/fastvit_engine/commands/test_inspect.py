"""`fastvit inspect`."""

import numpy as np
import pytest
import torch
from PIL import Image

import fastvit_engine
from fastvit_engine.commands import inspect
from fastvit_engine.evaluate import inspection
from fastvit_engine.models.inspect import attention_rollout, mean_attention_distance, pos_embed_similarity
from fastvit_engine.observe.report.inspected import TITLES


@pytest.fixture
def photos(tmp_path, photo):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(photo(number))
    return folder


@pytest.mark.parametrize("pool", ["cls", "gap", "map"])
def test_the_numbers_are_those_of_the_model_for_the_images_that_evaluation_sees(
    fastvit, write_model, photos, tmp_path, monkeypatch, pool
):
    monkeypatch.setattr(inspection, "_MAP_BYTES", 1)  # one image at a time
    out, file = tmp_path / "out", write_model(pool=pool, depth=2, registers=3)
    figures = inspection.FIGURES if pool == "cls" else ("attention_distance",)  # drawing takes longest
    words = ("--images", photos, "--limit", 4, "--figures", *figures)
    code, found, errors = fastvit("inspect", file, *words, "--out", out, "--json")
    assert code == 0 and errors == ""
    names = [f"{name}{suffix}" for name in figures for suffix in (".png", ".svg", "-dark.png", "-dark.svg")]
    assert found["figures"] == [str(out / name) for name in names]
    with np.load(out / "inspect.npz") as arrays:
        assert {name: list(arrays[name].shape) for name in arrays.files} == found["arrays"]
        model = fastvit_engine.load_model(file)
        images = torch.from_numpy(arrays["images"])
        assert images.shape == (4, 8, 8, 3) and images.dtype == torch.uint8
        attention = model.attention_maps(images)
        assert np.allclose(arrays["attention_distance"], mean_attention_distance(attention, 2, 4), atol=1e-6)
        if pool != "cls":
            return
        assert np.allclose(arrays["rollout"], attention_rollout(attention, 2, class_token=True), atol=1e-6)
        assert np.allclose(arrays["pos_embed_similarity"], pos_embed_similarity(model.pos_embed, 2), atol=1e-6)
        assert arrays["filters"].shape == (28, 48) and arrays["filter_variance"].shape == (28,)
        assert arrays["filter_variance"].sum() < arrays["filter_variance_total"]


def test_without_a_class_token_the_mean_of_the_patches_is_rolled_out(write_model):
    model = fastvit_engine.load_model(write_model(pool="gap", depth=2, registers=3))
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    found = inspection.inspect_images(model, [images], ["rollout"])["rollout"]
    expected = attention_rollout(model.attention_maps(images), 2, class_token=False)
    assert np.allclose(found, expected, atol=1e-6)
    assert not np.allclose(found, attention_rollout(model.attention_maps(images), 2), atol=1e-4)


def test_figures_are_pictures_for_light_and_dark_pages(fastvit, model_file, photos, tmp_path):
    out = tmp_path / "out"
    code, printed, _ = fastvit("inspect", model_file, "--images", photos, "--out", out)
    assert code == 0 and [line.partition(" ")[0] for line in printed.splitlines()[:4]] == [
        f"{out / name}.png" for name in inspection.FIGURES
    ]
    for name in inspection.FIGURES:
        light, dark = (np.asarray(Image.open(out / f"{name}{suffix}.png").convert("L")) for suffix in ("", "-dark"))
        assert light.shape == dark.shape and light[0, 0] > 240 and dark[0, 0] < 40
        assert len(np.unique(light)) > 20  # something is drawn
        assert (out / f"{name}.svg").read_text().startswith("<?xml")
    again = tmp_path / "again"
    assert fastvit("inspect", model_file, "--figures", "filters", "--out", again)[0] == 0
    assert (again / "filters.svg").read_bytes() == (out / "filters.svg").read_bytes()


def test_shards_are_read_in_their_order_whatever_the_workers(fastvit, model_file, photos, tmp_path, write_tar, photo):
    members = [
        (f"{number}.{kind}", content)
        for number in range(7)
        for kind, content in (("jpg", photo(number)), ("cls", b"0"))
    ]
    shard = write_tar(tmp_path / "a.tar", members)
    found = []
    for workers in (0, 2):
        out = tmp_path / f"{workers}"
        words = ("--images", shard, "--limit", 5, "--batch-size", 2, "--set", f"data.num_workers={workers}")
        assert fastvit("inspect", model_file, *words, "--figures", "attention_distance", "--out", out)[0] == 0
        with np.load(out / "inspect.npz") as arrays:
            found.append(arrays["images"])
    folder = tmp_path / "folder"
    assert (
        fastvit("inspect", model_file, "--images", photos, "--figures", "attention_distance", "--out", folder)[0] == 0
    )
    with np.load(folder / "inspect.npz") as arrays:
        assert np.array_equal(found[0], arrays["images"]) and np.array_equal(*found)


def test_weights_alone_need_no_images(fastvit, model_file, tmp_path):
    code, found, _ = fastvit("inspect", model_file, "--out", tmp_path / "out", "--json")
    assert code == 0 and set(found["arrays"]) == {
        "filters", "filter_variance", "filter_variance_total", "pos_embed_similarity",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--figures", "rollout"), "--figures rollout looks at images: name shards or a folder of them with --images"),
        (("--figures", "filters", "--images", "photos"), "--images has no effect on --figures filters: leave it out"),
        (("--images", "empty"), "empty"),
        (("--images", "absent"), "absent"),
        (("--images", "both"), "both holds shards (a.tar) and images (0.jpg): name the shards as a pattern"),
        (("--images", "broken"), "no image is usable"),
    ],
)
def test_what_cannot_be_drawn_is_refused(fastvit, model_file, photos, tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "both", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "both" / "0.jpg").write_bytes((photos / "0.jpg").read_bytes())
    (tmp_path / "both" / "a.tar").write_bytes(bytes(1024))
    (tmp_path / "broken" / "0.jpg").write_bytes(b"no image")
    code, _, errors = fastvit("inspect", model_file, *words, "--out", "out")
    assert code == 2 and sentence in errors and not (tmp_path / "out").exists()


@pytest.mark.parametrize("at", ["input", "every_layer"])
def test_tables_of_columns_and_rows_are_drawn_as_the_positions_that_they_make(fastvit, write_model, tmp_path, at):
    file, out = write_model(pos_embed="learned_2d", pos_embed_at=at, depth=2), tmp_path / "out"
    assert fastvit("inspect", file, "--figures", "pos_embed", "--out", out)[0] == 0
    model = fastvit_engine.load_model(file)
    columns, rows = model.pos_embed_x[0], model.pos_embed_y[0]  # of the first layer
    patches = [torch.cat([columns[x], rows[y]]) for y in range(2) for x in range(2)]
    with np.load(out / "inspect.npz") as arrays:
        assert np.allclose(arrays["pos_embed_similarity"], pos_embed_similarity(torch.stack(patches), 2), atol=1e-6)
    with pytest.raises(ValueError, match="pos_embed holds 2 tables"):
        pos_embed_similarity(torch.zeros(2, 4, 8), 2)


@pytest.mark.parametrize("kind", ["none", "relative"])
def test_a_model_that_adds_no_position_has_the_other_figures(fastvit, write_model, tmp_path, kind):
    file, out = write_model(pos_embed=kind), tmp_path / "out"
    code, _, errors = fastvit("inspect", file, "--figures", "filters", "pos_embed", "--out", out)
    assert code == 2 and not out.exists()
    assert f"model.pos_embed = {kind}" in errors and "there are filters, attention_distance, rollout" in errors
    code, found, errors = fastvit("inspect", file, "--out", out, "--json")
    assert code == 0 and f"note: no figure pos_embed, as model.pos_embed is {kind}" in errors
    assert "pos_embed_similarity" not in found["arrays"] and not (out / "pos_embed.png").exists()


def test_weights_that_are_broken_are_named(fastvit, write_model, photos, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    file = write_model(seed=3)
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    tensors["blocks.0.attn.qkv.weight"] = 1e38 * tensors["blocks.0.attn.qkv.weight"].sign()
    save_file(tensors, tmp_path / "large.safetensors", metadata=metadata)
    code, _, errors = fastvit("inspect", tmp_path / "large.safetensors", "--images", photos, "--out", tmp_path / "out")
    assert code == 2 and "attention is not finite" in errors


def test_command_and_report_know_every_figure():
    assert tuple(TITLES) == inspect._FIGURES == inspection.FIGURES
    assert inspect._OF_IMAGES == inspection.OF_IMAGES
