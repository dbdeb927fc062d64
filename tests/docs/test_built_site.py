"""The documentation site, as built, reads well on a phone and a screen, in both themes, and its links lead on."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import CHROMIUM, Tab, chromium
from tests.docs.site import broken_links, build, faults, pages_of
from tests.in_full import only_in_full

pytestmark = pytest.mark.slow
with_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
SOUND = (
    '<!doctype html><html lang="en"><style>:root { color-scheme: light dark } body { background: Canvas }</style>'
    '<body><h1 id="a">A</h1><a href="#a">a</a> {}</body></html>'
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of somebody who does not say where the repository is: links to files lead to copies of them."""
    out = tmp_path_factory.mktemp("built") / "site"
    build(out, {name: value for name, value in os.environ.items() if name != "FASTVIT_SOURCE_URL"})
    return out


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@only_in_full
def test_every_link_of_the_site_leads_to_a_page_an_anchor_or_a_file(site: Path) -> None:
    assert (site / "index.html").is_file() and (site / "docs" / "README.html").is_file()
    assert list(broken_links(site)) == []


@only_in_full
@with_browser
def test_every_page_of_the_site_fits_reads_and_is_silent(site: Path, tab: Tab) -> None:
    pages = [page for page in pages_of(site) if page != site / "index.html"]  # which only forwards
    assert len(pages) > 40
    assert [fault for page in pages for fault in faults(tab, page)] == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "other.html").write_text('<h1 id="b">B</h1>')
    page = tmp_path / "page.html"
    page.write_text(
        '<p id="a"><a href="#a">a</a><a href="folder/other.html#b">b</a><a href="https://host/x#y">c</a>'
        '<a href="gone.html">d</a><a href="#gone">e</a><a href="folder/other.html#gone">f</a><img src="gone.png">'
        '<a href="file:///home/me/x">g</a>'
    )
    assert list(broken_links(tmp_path)) == [
        "page.html: #gone has no such anchor",
        "page.html: file:///home/me/x is on this machine alone",
        "page.html: folder/other.html#gone has no such anchor",
        "page.html: gone.html leads nowhere",
        "page.html: gone.png leads nowhere",
    ]


@only_in_full
@with_browser
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", []),
        ('<pre style="width: 600px">x</pre>', ["light, 375 px: scrolls", "dark, 375 px: scrolls"]),
        ('<a style="color: #808080">x</a>', ["light, 375 px: contrast 3.95", "light, 1280 px: contrast 3.95"]),
        ('<img src="gone.png" alt="x">', ["no picture file://", "ERR_FILE_NOT_FOUND"] * 2),
        ("<script>console.error('oh')</script>", ["light: console.error: oh", "dark: console.error: oh"]),
        ("<script>gone()</script>", ["ReferenceError: gone"] * 2),
        ("<style>:root { color-scheme: light !important }</style>", ["light and dark are the same"]),
    ],
)
def test_faults_of_a_page_are_found(tmp_path: Path, tab: Tab, content: str, expected: list[str]) -> None:
    page = tmp_path / "page.html"
    page.write_text(SOUND.replace("{}", content))
    found = list(faults(tab, page))
    assert len(found) == len(expected), found
    assert all(part in fault for part, fault in zip(expected, found, strict=True)), found
