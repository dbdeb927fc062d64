"""The documentation site has every page in its navigation, and links that work outside the repository."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pages", DOCS / "pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation_once(pages: ModuleType) -> None:
    sections = pages.navigation(pages.FRONT.read_text())
    listed = [page for section in sections.values() for page in section]
    assert len(listed) == len(set(listed))
    assert set(listed) == pages.PAGES - {pages.FRONT}
    assert list(sections)[0] == "Getting started" and all(sections.values())


def test_the_front_page_gets_a_list_of_pages_for_each_section(pages: ModuleType) -> None:
    text = pages.with_navigation("# T\n\n## One\n\n[a](data.md) [b](data.md#order)\n\n## Two\n\n[c](../CHANGELOG.md)\n")
    assert text.count("```{toctree}") == 2
    assert ":caption: One\n\n/docs/data\n```" in text and ":caption: Two\n\n/CHANGELOG\n```" in text


def test_links_to_files_get_the_address_of_the_repository(pages: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVIT_SOURCE_URL", "https://host/owner/name/blob/v1/")
    picture, base = "../benchmarks/results/quickstart/report.png", "https://host/owner/name"
    page = f"[`a`](../Makefile) [b](data.md#x) [c](#y) [d](https://z) ![e]({picture})\n```\n[f](gone)\n```\n`[g](gone)`"
    kept = page.replace("../Makefile", f"{base}/blob/v1/Makefile")
    everything = kept.replace("data.md", f"{base}/blob/v1/docs/data.md")
    raw = f"{base}/raw/v1/benchmarks/results/quickstart/report.png"
    assert pages.absolute_links(page, DOCS) == everything.replace(picture, raw)
    assert pages.absolute_links(page, DOCS, keep=lambda path: path.suffix in (".md", ".png")) == kept


def test_a_link_that_leads_nowhere_is_an_error(pages: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTVIT_SOURCE_URL", raising=False)
    with pytest.raises(FileNotFoundError, match=r"links to gone\.md: no such file"):
        pages.absolute_links("[a](gone.md)", DOCS)


def test_without_an_address_links_download_files_and_folders_are_only_named(
    pages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTVIT_SOURCE_URL", "")
    page = "[`a`](../Makefile) [b](../tests) [c](data.md#x) [d](https://z) [e](../Makefile#f) `[g](../tests)`"
    assert pages.absolute_links(page, DOCS, keep=lambda path: path.suffix == ".md") == (
        "[`a`](path:../Makefile) b [c](data.md#x) [d](https://z) [e](path:../Makefile) `[g](../tests)`"
    )
    with pytest.raises(SystemExit, match="^set FASTVIT_SOURCE_URL=https://"):
        pages.rewrite(tmp_path)


def test_a_release_has_readmes_whose_links_work_on_a_package_index(
    pages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTVIT_SOURCE_URL", "https://host/owner/name/blob/v1")
    (tmp_path / "kernels").mkdir()
    for name in ("README.md", "kernels/README.md"):
        (tmp_path / name).write_text((DOCS.parent / name).read_text())
    pages.rewrite(tmp_path)
    for name in ("README.md", "kernels/README.md"):
        links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", (tmp_path / name).read_text()))
        assert links and all(re.match("https?://|#", link) for link in links)
    assert (
        "](https://host/owner/name/raw/v1/benchmarks/results/quickstart/report.png)"
        in (tmp_path / "README.md").read_text()
    )
