import json
import re
import sys
import tarfile

import pytest
import torch

from benchmarks import suite
from benchmarks.data import write_shards
from benchmarks.kernels import Selection, select
from benchmarks.plots import pyplot
from benchmarks.report import NO_KERNELS, aligned, without_gpu
from fastvit_engine.cli import main
from fastvit_engine.commands import bench
from fastvit_engine.data.pixels.decode import decode_image
from fastvit_engine.errors import UserError


@pytest.mark.distributed
def test_the_command_measures_checks_and_writes(tmp_path, capsys):
    """From the command line through the measuring process to the files; the rest of the suite is the same path."""
    pytest.importorskip("matplotlib")
    chosen = ["--ops", "layer_norm", "adamw", "--shape", "tiny/14@56", "--providers", "fastvit", "eager", "torch fused"]
    assert main(["bench", "kernels", "--quick", *chosen, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for line in (
        r"layer_norm: layer normalisation\nmilliseconds of +forward +backward +both +fastvit × +of ceiling +host_ms\n",
        r"tiny/14@56, 4 images, fp32\n",
        r"  fastvit \(reference\)( +[\d.,]+){3} ",
        r"  eager( +[\d.,]+){4} ",
        r"adamw: ",
        r"Summary: .*\n.*fwd × bwd × both ×\nlayer_norm \(reference\) +tiny/14@56, 4 +[\d.,]+ eager ( +[\d.]+){3}\n",
    ):
        assert re.search(line, printed), (line, printed)
    assert printed.index("adamw: ") < printed.index("Summary: ")
    (place,) = tmp_path.glob("cpu/kernels-*.json")
    record = json.loads(place.read_text())
    assert [case["op"] for case in record["cases"]] == ["layer_norm", "adamw"] and record["quick"]
    assert len(record["ceilings"]) == 2 and record["error"] is None
    assert all(row["status"] in ("ok", "skipped") for case in record["cases"] for row in case["providers"])
    pictures = sorted(path.name.split("-", 4)[-1] for path in place.parent.glob("*.png"))
    assert pictures == ["bars-tiny-14-56-4.png", "roofline.png"]
    (text,) = place.parent.glob("*.md")
    assert "| **fastvit (reference)** |" in text.read_text() and "| layer_norm (reference) |" in text.read_text()


@pytest.mark.distributed
def test_what_the_interpreter_ran_is_not_called_plain_pytorch(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1"), monkeypatch.setenv("FASTVIT_KERNELS", "triton")
    chosen = ["--ops", "layer_norm", "--shape", "tiny/14@56", "--providers", "fastvit", "eager"]
    assert main(["bench", "kernels", "--quick", *chosen]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"  fastvit \(interpreted\)( +[\d.,]+){3} ", printed)
    assert "interpreter ran the kernels" in " ".join(printed.split()) and "plain PyTorch path" not in printed


def test_of_what_failed_nothing_is_said_to_have_run():
    row = {"provider": "fastvit", "status": "failed", "reason": "no GPU"}
    record = {
        "suite": "kernels",
        "environment": {"gpu": None},
        "cases": [{"providers": [row]}, {"failed": "no memory"}],
    }
    assert without_gpu(record) == []
    row["path"] = "reference"
    assert without_gpu(record) == [NO_KERNELS]


def test_figures_are_written_without_matplotlib_and_without_nan(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    case = {"case": "x", "error": float("nan"), "providers": [{"status": "ok"}]}
    record = {"suite": "kernels", "environment": {"started": "2026-01-02T03:04", "gpu": "G"}, "cases": [case]}

    def draw(record, folder, stem):
        return [pyplot()]

    assert suite.write(record, "# text\n", tmp_path, draw) == "kernels-2026-01-02"
    assert (tmp_path / "kernels-2026-01-02.md").read_text() == "# text\n"
    written = json.loads((tmp_path / "kernels-2026-01-02.json").read_text(), parse_constant=pytest.fail)
    assert written["cases"][0]["error"] is None
    assert "no pictures: matplotlib is not installed" in capsys.readouterr().err


def test_without_rich_there_is_the_markdown_and_a_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.delitem(sys.modules, "benchmarks.terminal", raising=False)
    assert suite.shown("kernels", {}, "# text\n") == "# text\n"
    assert "no table for terminals: rich.console is not installed" in capsys.readouterr().err
    assert main(["bench", "kernels", "--list"]) == 2
    assert "--list needs rich.console: pip install" in capsys.readouterr().err


def test_a_wrong_result_of_ours_is_an_exit_code(monkeypatch, capsys):
    def measure(args, folder):
        return "text", {"cases": [{"providers": [{"provider": args.action, "ours": True, "status": "wrong"}]}]}

    monkeypatch.setitem(suite.MEASURE, "train", measure)
    assert main(["bench", "train", "--quick"]) == 1
    assert capsys.readouterr().out == "text\n"
    for row in ({"provider": "fastvit"}, {"provider": "my.py:norm", "own": True}):
        assert suite.wrong({"cases": [{"providers": [row | {"status": "wrong"}]}]})
    assert not suite.wrong({"cases": [{"providers": [{"provider": "timm", "status": "wrong"}]}]})


def test_all_goes_on_behind_a_suite_that_fails(monkeypatch, capsys):
    def fails(args, folder):
        raise UserError("no luck")

    for name in suite.SUITES:
        record = {"cases": [], "unmeasured": [], "environment": {"gpu": "G"}}
        monkeypatch.setitem(suite.MEASURE, name, lambda args, folder, name=name, record=record: (name, record))
    monkeypatch.setitem(suite.MEASURE, "train", fails)
    assert main(["bench", "all", "--quick"]) == 1
    printed = capsys.readouterr()
    assert [line for line in printed.out.splitlines() if line in suite.SUITES] == ["data", "overhead"]
    assert "Summary" in printed.out  # of the kernels
    assert "train failed: UserError: no luck" in printed.err


def test_bad_input_is_one_sentence(capsys, monkeypatch, tmp_path):
    assert main(["bench", "kernels", "--quick", "--ops", "atention"]) == 2
    assert "fastvit bench kernels: there is no operation 'atention' to measure here" in capsys.readouterr().err
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "a" / "b" / "bench.py"))  # a package without its checkout
    assert main(["bench", "kernels", "--quick"]) == 2
    assert "needs the folder benchmarks/ of a checkout" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("quick", "name", "way"),
    [
        (False, "H/14", "is measured on a GPU only; here there are 'Ti/16', 'S/16'"),
        (True, "S/16", "is not in a quick run: leave out --quick; here there are 'Ti/16@64', 'tiny/14@56'"),
        (False, "tiny/14@56", "is in a quick run only: add --quick"),
    ],
)
def test_a_size_that_is_measured_elsewhere_is_refused_with_the_way_to_it(quick, name, way):
    with pytest.raises(ValueError, match=f"the size '{name}' {way}"):
        select(Selection(quick=quick, models=(name,)), torch.device("cpu"))


def test_noise_is_the_same_everywhere_and_can_be_trained_on(tmp_path):
    first, second = (write_shards(tmp_path / name, 5, height=60, width=80, per_shard=3) for name in "ab")
    assert [path.name for path in sorted(first.iterdir())] == ["noise-0000.tar", "noise-0001.tar"]
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
    with tarfile.open(first / "noise-0001.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    assert list(members) == ["000003.jpg", "000003.cls", "000004.jpg", "000004.cls"]
    assert 0 <= int(members["000004.cls"]) < 1000
    assert decode_image(members["000004.jpg"]).shape == (60, 80, 3)


def test_tables_are_aligned_for_a_terminal():
    assert aligned("# Title\n\n| what | ms |\n|---|---:|\n| a | 1 |\n| longer | 12.5 |\n| failed | |\n\nend\n") == (
        "# Title\n\n"
        "| what   |   ms |\n"
        "| ------ | ---: |\n"
        "| a      |    1 |\n"
        "| longer | 12.5 |\n"
        "| failed |      |\n"
        "\nend\n"
    )
