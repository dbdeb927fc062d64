import json
import subprocess
import sys

import pytest

from fastvit_engine.cli import main
from tests.kernels.integrations.conftest import TORCHVISION  # lets timm be imported

assert TORCHVISION is None or TORCHVISION.ns == "torchvision"


def flops(capsys, *words):
    assert main(["flops", *words]) == 0
    return capsys.readouterr().out


def failed(capsys, *words):
    try:
        code = main(["flops", *words])
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1
    return error


def test_models_by_name(capsys):
    said = json.loads(flops(capsys, "H/14", "R50x1", "R50+B/16", "--json"))
    assert [*said] == ["models"] and [*said["models"][0]] == ["name", "parameters", "macs", "tokens", "image_size"]
    h14, resnet, hybrid = said["models"]
    assert (h14["name"], h14["parameters"], h14["tokens"], h14["image_size"]) == ("H/14", 632_045_800, 257, 224)
    assert h14["macs"] == pytest.approx(167.3e9, rel=1e-3)
    assert (resnet["parameters"], resnet["tokens"]) == (25_549_352, None)
    assert (hybrid["parameters"], hybrid["tokens"]) == (98_659_112, 197)


def test_dropped_patches(capsys):
    (whole,), (half,) = (
        json.loads(flops(capsys, "B/16", *words, "--json"))["models"] for words in ([], ["--patch-drop", "0.5"])
    )
    assert half["tokens"] == 1 + 98 and half["parameters"] == whole["parameters"]
    assert 0.48 < half["macs"] / whole["macs"] < 0.5  # attention falls faster than tokens
    assert "R50x1 is none of them" in failed(capsys, "R50x1", "--patch-drop", "0.5")
    assert "1 is no share from 0 up to, but not including, 1" in failed(capsys, "B/16", "--patch-drop", "1")


def test_a_model_of_timm(capsys):
    pytest.importorskip("timm", reason="timm is not installed")
    (model,) = json.loads(flops(capsys, "timm/resnet18", "--json"))["models"]
    assert (model["parameters"], model["tokens"]) == (11_689_512, None)
    assert model["macs"] == pytest.approx(1.82e9, rel=0.01)


def test_images_and_classes(capsys):
    (model,) = json.loads(flops(capsys, "B/16", "--image-size", "384", "--num-classes", "0", "--json"))["models"]
    assert (model["tokens"], model["image_size"]) == (577, 384)
    assert model["parameters"] == 86_567_656 - 769_000 + (577 - 197) * 768
    assert model["macs"] == pytest.approx(55.5e9, rel=0.01)


def test_without_names_those_of_the_papers(capsys):
    lines = flops(capsys).splitlines()
    assert lines[0].split() == ["model", "parameters", "GMACs", "tokens", "image"]
    names = [line.split()[0] for line in lines[1:]]
    assert {"H/14", "R50+L/16", "R152x4"} <= set(names) and len(names) == len(set(names))
    assert [line for line in lines if line.startswith("R50x1 ")][0].split()[1:4] == ["25,549,352", "4.089", "none"]


def test_the_table_of_the_paper(capsys):
    rows = json.loads(flops(capsys, "--table6", "--json"))["table6"]
    assert len(rows) == 18
    assert [*rows[0]] == ["name", "epochs", "exaflops", "paper", "parameters", "macs"]
    for row in rows:
        off = abs(row["exaflops"] / row["paper"] - 1)
        resnet, hybrid, which = "x" in row["name"], "+" in row["name"], (row["name"], row["epochs"])
        most = 0.045 if resnet else 0.02 if hybrid else 0.003
        assert off < {("B/32", 7): 0.025, ("R50+L/16", 7): 0.035}.get(which, most), row
        assert row["exaflops"] == pytest.approx(6 * row["macs"] * row["epochs"] * 303e6 / 1e18)
        if resnet:
            assert off > 0.03  # all seven, as the table says
    by_name = {(row["name"], row["epochs"]): row for row in rows}
    assert by_name["R50+L/16", 14]["exaflops"] == pytest.approx(1668.1, abs=0.05)
    text = flops(capsys, "--table6")
    assert "counting gives 3.1 to 4.1 % more" in text and "-0.0 %" not in text
    assert "R200x3        14   3,419.4  3,306      +3.4 %  568,633,000  134.347" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--table6", "B/16"], "--table6 has the models, image size and classes of the paper: leave B/16 out"),
        (["--table6", "--image-size", "384"], "leave --image-size out"),
        (["--table6", "--num-classes", "0"], "leave --num-classes out"),
        (["X/16"], "model.name 'X/16' is not a size and a patch size"),
        (["R51x1"], "model.name 'R51x1' is no hybrid or ResNet that this version knows; hybrids: R+Ti/16,"),
        (["B/16", "--image-size", "225"], "image_size 225 is not a multiple of the patch size 16"),
        (["B/16", "--image-size", "0"], "--image-size: 0 is less than 1"),
        (["B/16", "--image-size", "70000"], "--image-size 70000: input should be less than or equal to 65536"),
        (["B/16", "--num-classes", "-1"], "--num-classes: -1 is less than 0"),
    ],
)
def test_bad_input_is_one_sentence(capsys, words, said):
    assert said in failed(capsys, *words)


def test_a_wrong_name_is_refused_before_pytorch_is_loaded():
    code = "import sys; from fastvit_engine.cli import main; code = main(['flops', 'X/16']); "
    code += "assert 'torch' not in sys.modules; sys.exit(code)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 2
