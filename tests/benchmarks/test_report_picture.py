"""The pictures of reports in the documentation."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.report_picture import RESULTS, main


def test_the_picture_shows_the_recorded_quick_start_at_a_fixed_size(tmp_path: Path) -> None:
    if shutil.which("chromium") is None:
        pytest.skip("no Chromium")
    sizes = []
    for options in ([], ["--top", "100", "--height", "300"]):
        assert main(["--out", str(tmp_path / "page.png"), *options]) == 0
        with Image.open(tmp_path / "page.png") as image:
            sizes.append(image.size)
            colours = image.convert("RGB").getcolors(1 << 20)
        assert colours is not None and len(colours) > 20
    with Image.open(RESULTS / "report.png") as committed:
        assert sizes == [committed.size, (1000, 300)]


def test_without_chromium_one_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--out", str(tmp_path / "page.png")]) == 2
    assert "no Chromium: install the package 'chromium'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
