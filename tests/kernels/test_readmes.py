"""The Python in the package's README files runs as it stands, one block after the other on each page."""

import re
from pathlib import Path

import pytest

import tests.kernels.integrations.conftest  # noqa: F401, lets timm be imported
from fastvit_kernels.hub.build import build

KERNELS = Path(__file__).parents[2] / "kernels"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [page for page in sorted(KERNELS.rglob("README.md")) if BLOCK.search(page.read_text())]
OPERATIONS = sorted(path.parent for path in KERNELS.glob("fastvit_kernels/*/reference.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(KERNELS)))
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text()
    monkeypatch.chdir(tmp_path)
    if "get_local_kernel" in text:
        pytest.importorskip("kernels", reason="kernels is not installed")
        build(tmp_path / "fastvit-kernels")
    if "timm" in text:
        pytest.importorskip("timm", reason="timm is not installed")
    names: dict[str, object] = {"__name__": "example"}
    for block in BLOCK.finditer(text):
        lines = text.count("\n", 0, block.start(1))
        exec(compile("\n" * lines + block[1], str(page), "exec"), names)  # the lines of an error are those of the page


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda path: path.name)
def test_every_operation_has_an_example(operation: Path) -> None:
    assert operation / "README.md" in PAGES
