"""`fastvit robustness`."""

import json

import pytest

from fastvit_kernels import dispatch

QUICK = ("--set", "data.num_workers=0")
FEW = ("--limit", 60, "--patch-steps", 2, "--patch-images", 20, *QUICK)


@pytest.fixture(scope="module")
def plain_model(write_model):
    return write_model(3, names=None, image_size=16)


def test_a_model_is_measured_in_three_ways(fastvit, plain_model, digits):
    code, found, _ = fastvit("robustness", plain_model, "--data", digits, *FEW, "--json")
    assert code == 0 and list(found) == ["samples", "top1", "occlusion", "shuffle", "patch"]
    assert found["samples"] == 60
    assert [row["ratio"] for row in found["occlusion"]] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert [row["tiles"] for row in found["shuffle"]] == [1, 2, 4, 8]
    assert [row["size"] for row in found["patch"]] == [0, 1, 2, 3, 5]
    rows = [row for name in ("occlusion", "shuffle", "patch") for row in found[name]]
    assert all(0 <= value <= 1 for row in rows for name, value in row.items() if name.startswith("top1"))
    _, plain, _ = fastvit("evaluate", plain_model, "--data", digits, "--limit", 60, *QUICK, "--json")
    assert found["top1"] == plain["top1"] == found["occlusion"][0]["top1"] == found["shuffle"][0]["top1"]


def test_the_figures_are_the_same_again_with_several_workers_and_other_batches(fastvit, plain_model, digits):
    words = ("robustness", plain_model, "--data", digits, "--tests", "occlusion", "shuffle", "--limit", 60, "--json")
    _, first, _ = fastvit(*words, *QUICK)
    _, second, _ = fastvit(*words, "--set", "data.num_workers=2", "--batch-size", 7)
    assert first == second
    _, other, _ = fastvit(*words, *QUICK, "--seed", 1)
    assert other["top1"] == first["top1"] and other != first


def test_several_models_are_drawn_together(fastvit, plain_model, write_model, digits, tmp_path):
    other, out = write_model(4, names=None, image_size=16), tmp_path / "out"
    words = ("--tests", "shuffle", "--stylised", digits, "--limit", 30, "--out", out, *QUICK)
    code, text, errors = fastvit("robustness", plain_model, other, "--data", digits, *words)
    assert code == 0 and "tiles exchanged" in text and "stylised: top-1" in text and str(out) in errors
    assert sorted(path.name for path in out.iterdir()) == [
        "robustness-dark.png", "robustness-dark.svg", "robustness.json", "robustness.png", "robustness.svg",
    ]  # fmt: skip
    found = json.loads((out / "robustness.json").read_text())["models"]
    assert [figures["model"] for figures in found] == [str(plain_model), str(other)]
    assert all(set(figures) == {"model", "samples", "top1", "shuffle", "stylise"} for figures in found)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("--patch-images", 60, "--limit", 60),
            "and there are 60: choose fewer with --patch-images, or leave patch out",
        ),
        (("--limit", 3), "and there are 3: choose fewer"),
        (("--tests", "noise"), "unknown --tests 'noise': there are occlusion, shuffle, patch"),
        (("--stylised", "absent", "--tests", "shuffle", "--limit", 10), "absent"),
    ],
)
def test_what_cannot_be_measured_is_refused(fastvit, plain_model, digits, words, sentence, capsys):
    try:
        code, _, errors = fastvit("robustness", plain_model, "--data", digits, *words, *QUICK)
    except SystemExit as exit:
        code, errors = exit.code, capsys.readouterr().err
    assert code == 2 and sentence in errors


def test_a_model_without_a_head_is_refused(fastvit, write_model, digits):
    file = write_model(5, names=None, image_size=16, num_classes=0)
    code, _, errors = fastvit("robustness", file, "--data", digits, *QUICK)
    assert code == 2 and "has no head, so it names no class" in errors


def test_other_classes_than_the_models_are_refused(fastvit, write_model, digits):
    code, _, errors = fastvit("robustness", write_model(6, image_size=16), "--data", digits, *QUICK)
    assert code == 2 and "class 0 is 'zero' in the model and '0' in the data: give images of the model's" in errors


def test_kernels_that_have_no_gradient_of_images_are_refused_with_a_setting_that_works(fastvit, plain_model, digits):
    words = ("robustness", plain_model, "--data", digits, "--limit", 6, "--tests", "occlusion", *QUICK)
    with dispatch.using("triton"):
        code, _, errors = fastvit(*words)
    assert code == 2 and "FASTVIT_KERNELS=triton,patch_embed=auto" in errors
    with dispatch.using("triton,patch_embed=auto"):
        assert fastvit(*words)[0] == 0
