"""`make test` fails when a test is skipped for a reason that tests/skips.py does not list."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def outcome(folder: Path, source: str, *options: str) -> tuple[int, str]:
    (folder / "test_it.py").write_text(f"import pytest\n{source}\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.skips", "-p", "no:cacheprovider", *options, folder]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["one process", "two workers"])
@pytest.mark.parametrize(
    "source",
    [
        "def test(): pytest.skip('I felt like it')",
        "@pytest.mark.skipif(True, reason='I felt like it')\ndef test(): pass",
        "pytest.importorskip('no_such_package')\ndef test(): pass",
        "pytest.skip('I felt like it', allow_module_level=True)",
    ],
    ids=["call", "mark", "missing package", "module"],
)
def test_an_unknown_reason_fails_the_run(tmp_path: Path, source: str, options: tuple[str, ...]) -> None:
    code, text = outcome(tmp_path, source, *options)
    assert code == 1
    end = text[text.index("that tests/skips.py does not list") :]  # below pytest's own list of what was skipped
    assert "SKIPPED" not in end
    assert "I felt like it" in end or "could not import 'no_such_package'" in end


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["one process", "two workers"])
def test_known_reasons_and_expected_failures_do_not(tmp_path: Path, options: tuple[str, ...]) -> None:
    source = (
        "def test_gpu(): pytest.skip('no GPU')\n"
        "@pytest.mark.skipif(True, reason='the whole matrix takes minutes: FASTVIT_TEST_CLUSTER=all')\n"
        "def test_matrix(): pass\n"
        "@pytest.mark.xfail(strict=True)\ndef test_xfail(): assert False\n"
        "def test_passes(): pass"
    )
    code, text = outcome(tmp_path, source, *options)
    assert code == 0 and "1 passed, 2 skipped, 1 xfailed" in text


def test_a_failure_stays_a_failure(tmp_path: Path) -> None:
    code, text = outcome(tmp_path, "def test_fails(): assert False\ndef test_skips(): pytest.skip('no GPU')")
    assert code == 1 and "does not list" not in text
