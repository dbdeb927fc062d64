"""The pages say what is true of this checkout: links, commands, settings and figures."""

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import fastvit_engine
from fastvit_engine.cli import _parser
from fastvit_engine.config import load_config

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    {
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        ROOT / "SECURITY.md",
        ROOT / "kernels" / "CONTRIBUTING.md",
        ROOT / "kernels" / "README.md",
        ROOT / "benchmarks" / "README.md",
        ROOT / "benchmarks" / "NOTES.md",
        *(ROOT / "kernels" / "fastvit_kernels").glob("**/*.md"),
        *(ROOT / "docs").glob("**/*.md"),
        *(ROOT / "examples").glob("**/*.md"),
        *(ROOT / "launch").glob("**/*.md"),
    }
)
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(params=PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


def prose(page: Path) -> str:
    """A page without its code, in which brackets are no links."""
    return re.sub(r"`[^`\n]*`", lambda code: code[0].replace("(", "<"), FENCE.sub("", page.read_text()))


@cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?) *$", FENCE.sub("", page.read_text()), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()).replace(" ", "-")
        found.add(
            slug if slug not in found else next(f"{slug}-{n}" for n in range(1, 99) if f"{slug}-{n}" not in found)
        )
    return found


def broken_links(page: Path) -> Iterator[str]:
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            yield f"{link}: no such file"
        elif anchor and (target.suffix != ".md" or anchor not in anchors(target)):
            yield f"{link}: no such heading"


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of each `fastvit` in the shell blocks of a page, and of each training behind a launcher."""
    for language, block in FENCE.findall(page.read_text()):
        if language not in ("", "bash"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("fastvit "):
                yield shlex.split(line, comments=True)[1:]
            elif language == "bash" and line.startswith(("launch/", "sbatch ")):
                words = shlex.split(line, comments=True)
                yield ["train", *words[words.index("--") + 1 :]]


def test_relative_links_lead_to_files_and_headings(page):
    assert list(broken_links(page)) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A *heading*, once\n[a](gone.md) [b](#a-heading-once) [c](#gone) [d](https://host/x)\n```\n[e](f)\n```\n"
    )
    assert list(broken_links(page)) == ["gone.md: no such file", "#gone: no such heading"]


def test_every_page_is_in_the_index():
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in LINK.findall(prose(index))}
    assert set(index.parent.glob("**/*.md")) - {index} <= linked


def test_commands_are_accepted_by_the_command_line(page, tmp_path, monkeypatch):
    """Their arguments exist, and so do the recipes and settings that they name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHELL", "/bin/bash")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, recipe in re.findall(r"^```yaml\n# (\S+\.yaml)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(recipe)
    for words in commands(page):
        try:
            arguments = _parser().parse_args(words)
        except SystemExit as end:
            if end.code:
                pytest.fail(f"not a command: fastvit {shlex.join(words)}")
            continue  # an option that does its work at once, as --install-completion
        if recipe := getattr(arguments, "recipe", None):
            load_config(recipe, getattr(arguments, "set", None) or [])


def test_commands_within_sentences_exist(page):
    """Those of tables and advice: their command, and each option of it."""
    for words in re.findall(r"`fastvit ([a-z][^`]*)`", FENCE.sub("", page.read_text())):
        parser = _parser()
        for word in words.split():
            below = next((a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
            if below is None or not re.fullmatch(r"[a-z-]+", word) or word.startswith("-"):
                break
            assert word in below, f"not a command: fastvit {words}"
            parser = below[word]
        options = set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]+", words))
        if any(isinstance(a, argparse._SubParsersAction) for a in parser._actions):  # of several: `data ... --ray`
            continue
        assert options <= set(parser._option_string_actions), f"no such option: fastvit {words}"


def test_examples_in_python_import_what_exists(page):
    code = "\n".join(block for language, block in FENCE.findall(page.read_text()) if language == "python")
    for module, names in re.findall(r"^from (fastvit_[\w.]+) import (.+)$", code, re.MULTILINE):
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), f"{module} has no {name}"
    if "import fastvit_engine as fastvit" in code:
        for name in re.findall(r"\bfastvit\.(\w+)\(", code):
            assert hasattr(fastvit_engine, name), f"fastvit_engine has no {name}"


def test_every_row_of_what_happens_when_is_proven_by_a_test_that_exists():
    """Each row names the functions that prove it, with the files that they are in."""
    page = ROOT / "docs" / "verification.md"
    text = page.read_text()
    section = text[text.index("## What happens when") : text.index("## What has been measured")]
    tables = [table.splitlines() for table in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)]
    rows = [row for table in tables for row in table[2:]]
    assert len(tables) == 7 and len(rows) >= 61
    for row in rows:
        proofs = re.findall(r"\[`(test_\w+)`\]\(([^)]+)\)", row.split(" | ")[-1])
        assert row.count(" | ") == 3 and proofs, row
        for function, path in proofs:
            source = (page.parent / path).resolve()
            assert re.search(rf"^def {function}\(", source.read_text(), re.MULTILINE), f"{path} has no {function}"


def test_readme_is_short_and_names_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1000
    assert "make quickstart" in text and "make test" in text
    assert "not Apple's FastViT" in " ".join(text[:600].split())


def test_every_feature_of_the_readme_links_to_a_page_and_a_test():
    text = (ROOT / "README.md").read_text()
    features = text[text.index("## Features") : text.index("## Drop-in layers")].split("\n* ")[1:]
    assert len(features) == 10
    for feature in features:
        links = LINK.findall(feature)
        assert any(link.startswith("docs/") for link in links), feature
        assert any(re.match(r"tests/.*test_\w+\.py$", link) for link in links), feature


def test_figures_in_the_readme_are_those_of_the_verification_page():
    text = (ROOT / "README.md").read_text()
    table = re.findall(r"^\|.*\| (.*) \|$", text[text.index("## Results") : text.index("## Guided")], re.MULTILINE)
    proven = re.findall(r"\d[\d.,]*\d|\d", (ROOT / "docs" / "verification.md").read_text())
    figures = [figure for row in table for figure in re.findall(r"\d[\d.,]*\d|\d", row)]
    assert len(figures) >= 7 and set(figures) <= set(proven)
