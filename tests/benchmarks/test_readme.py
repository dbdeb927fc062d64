import json
from pathlib import Path

import pytest

from benchmarks.readme import BEGIN, END, PAGE, newest, render, update, with_results


def test_the_page_shows_the_newest_results():
    """If this fails: fastvit bench readme."""
    assert update(check=True) == 0


def test_results_that_are_linked_exist():
    text = PAGE.read_text()
    table = text[text.index(BEGIN) : text.index(END)]
    links = [part.partition(")")[0] for part in table.split("](")[1:]]
    assert links and all((PAGE.parent / link).is_file() for link in links)


def test_a_changed_table_is_noticed_and_put_right(tmp_path, capsys):
    page = tmp_path / "verification.md"
    page.write_text(PAGE.read_text().replace(" times the usual", " thousand times the usual"))
    assert update(check=True, page=page) == 1
    assert "run fastvit bench readme" in capsys.readouterr().err
    assert update(page=page) == 0
    assert page.read_text() == PAGE.read_text()


def test_a_page_without_the_marks_is_an_error():
    with pytest.raises(ValueError, match="to write results between"):
        with_results("text", "table")


def record(folder: Path, name: str, quick: bool, speed: float, status: str = "ok") -> None:
    passes = {
        key: {"times_as_fast": [speed] * 3, "as": "sdpa cudnn", "share_of_ceiling": 0.61}
        for key in ("forward", "backward", "both")
    }
    row = {"provider": "fastvit", "status": status, "reason": "off by a mile"} | (
        {"passes": passes} if status == "ok" else {}
    )
    case = {"title": "attention", "model": "H/14", "batch": 64, "dtype": "bfloat16", "providers": [row]}
    environment = {"gpu": "Some GPU", "cpu": "a CPU", "cpu_count": 1}
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps({"quick": quick, "environment": environment, "cases": [case]}))


def test_the_newest_full_run_counts(tmp_path):
    gpu = tmp_path / "some-gpu"
    record(gpu, "kernels-2026-01-01.json", False, 1.5)
    record(gpu, "kernels-2026-02-01.json", False, 1.25)
    record(gpu, "kernels-2026-03-01.json", True, 9.0)
    assert newest(gpu, "kernels") == gpu / "kernels-2026-02-01.json"
    table = render(tmp_path)
    assert (
        "| attention, H/14, 64 images, bfloat16 | Some GPU | forward 1.25 times as fast as sdpa cudnn; backward"
        in table
    )
    assert "61 % of this machine's own ceiling" in table and "no GPU figure yet" not in table


def test_a_wrong_operation_is_shown_as_such(tmp_path):
    record(tmp_path / "some-gpu", "kernels-2026-01-01.json", False, 1.5, status="wrong")
    table = render(tmp_path)
    assert "**wrong**: off by a mile" in table and "times as fast" not in table


def test_without_a_gpu_that_is_said(tmp_path):
    assert "There is no GPU figure yet" in render(tmp_path)
