"""The container image: what a linter says of its Dockerfile, and what its build leaves out."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "launch" / "docker" / "Dockerfile"


def test_the_dockerfile_passes_hadolint() -> None:
    beside = str(Path(sys.executable).parent)  # where pip puts it, whether or not the environment is activated
    hadolint = shutil.which("hadolint", path=beside) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint")
    checked = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_the_image_holds_nothing_that_git_ignores() -> None:
    """Docker reads a pattern as from the root, git one without a slash before its name as in any folder."""
    lines = (ROOT / ".gitignore").read_text().split()
    from_anywhere = {line.strip("/") if line.startswith("/") else f"**/{line.strip('/')}" for line in lines}
    left_out = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    assert {"**/.venv", ".git", *from_anywhere} == {line for line in left_out if not line.startswith("#")}
