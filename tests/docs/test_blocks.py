"""Every block of code in docs/ is run by a test, checked against the checkout, or marked with the reason why not.

A mark is a line before the block: `<!-- not run: REASON -->`. Commands that start with `fastvit`, or pass a recipe to a
launcher, are checked by tests/test_docs.py.
"""

import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("**/*.md"))
BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>.+) -->\n)? *```(?P<language>\w*)\n(?P<code>.*?)^ *```$", re.M | re.S)
TESTS = "\n".join(path.read_text() for path in sorted((ROOT / "tests").rglob("test_*.py")) if path != Path(__file__))
# Programs of others, words of the shell, and what tests/test_docs.py checks.
OTHERS = {
    "curl",
    "pip",
    "torchrun",
    "srun",
    "ray",
    "kubectl",
    "docker",
    "export",
    "for",
    "do",
    "done",
    "fastvit",
    "sbatch",
}


def follows(page: Path, section: str) -> bool:
    """Whether a test follows the page, or the section, by running its blocks."""
    folder = f'"{page.parent.name}" / ' if page.parent.name != "docs" else ""
    whole = rf'(?:DOCS / {re.escape(folder)}|GUIDES / )"{page.name}"'
    return bool(re.search(rf"{whole}\)", TESTS)) or bool(
        re.search(whole, TESTS) and re.search(rf'"#+ {re.escape(section)}"', TESTS)
    )


def unknown(line: str) -> str | None:
    """What is wrong with a line of shell that no test runs: what it names is not in this checkout."""
    words = shlex.split(line, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if not words or words[0] in OTHERS or line.startswith(" "):
        return None
    name, *rest = words
    if name == "make":
        return None if re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.M) else f"make {rest[0]}"
    if name == "python" and rest[0] in ("-c", "-m"):
        return None if rest[0] == "-c" or find_spec(rest[1]) else rest[1]
    path = rest[0] if name in ("bash", "python") else name
    return None if (ROOT / path).is_file() else path


def problems(page: Path) -> Iterator[str]:
    text = page.read_text()
    for block in BLOCK.finditer(text):
        headings = re.findall(r"^#+ (.*)$", text[: block.start()], re.M)
        section = headings[-1] if headings else ""
        if block["reason"] or follows(page, section):
            continue
        if block["language"] == "python":
            yield f"{section}: no test runs this Python:\n{block['code']}"
        elif block["language"] == "bash":
            wrong = [found for line in block["code"].replace("\\\n", " ").splitlines() if (found := unknown(line))]
            yield from (f"{section}: no such thing here: {name}" for name in wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_every_block_is_run_or_checked_or_marked(page: Path) -> None:
    assert list(problems(page)) == []


def test_a_block_that_nobody_runs_is_found(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(
        "## One\n```python\nx = 1\n```\n<!-- not run: needs a GPU -->\n```python\ny = 1\n```\n"
        "## Two\n```bash\nmake nothing  # none\nlaunch/gone.sh\nmake test\npython -m benchmarks.gone\n```\n"
    )
    found = list(problems(page))
    assert len(found) == 4 and found[0].startswith("One: no test runs this Python:\nx = 1")
    assert [text.partition(": ")[2] for text in found[1:]] == [
        f"no such thing here: {name}" for name in ("make nothing", "launch/gone.sh", "benchmarks.gone")
    ]
