"""Builds the documentation site, and finds what a reader of it would stumble over."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.browser import Tab

ROOT = Path(__file__).parents[2]
WIDTHS = (375, 1280)


def build(out: Path, environment: Mapping[str, str]) -> None:
    """Builds as `make site` does. An AssertionError quotes the warnings of Sphinx."""
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "-c", "docs"]
    command += ["-d", f"{out}.doctrees", ".", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=dict(environment), capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr


def pages_of(site: Path) -> list[Path]:
    """All pages of a site; its theme has templates among its own files."""
    return [page for page in sorted(site.glob("**/*.html")) if "_static" not in page.parts]


class _Links(HTMLParser):
    """The addresses that a page refers to, and the anchors that it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: set[str] = set()
        self.anchors: set[str] = {"", "top"}
        self.feed(page.read_text())
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if value and name in ("href", "src"):
                self.addresses.add(value)
            elif value and name in ("id", "name"):
                self.anchors.add(value)


def broken_links(site: Path) -> Iterator[str]:
    """What the pages of a site refer to and the site lacks: files and anchors. Other sites are not asked."""
    pages = {page.resolve(): _Links(page) for page in pages_of(site)}
    for page, links in pages.items():
        for address in sorted(links.addresses):
            parts = urlsplit(address)
            if parts.scheme == "file":
                yield f"{page.relative_to(site.resolve())}: {address} is on this machine alone"
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if not target.is_file():
                yield f"{page.relative_to(site.resolve())}: {address} leads nowhere"
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{page.relative_to(site.resolve())}: {address} has no such anchor"


def faults(tab: Tab, page: Path) -> Iterator[str]:
    """What is wrong with a page on a phone and on a screen, in both themes: errors, overflow, pale text, no picture."""
    backgrounds = set()
    for dark in (False, True):
        theme = f"{page.name}, {'dark' if dark else 'light'}"
        tab.open(page, WIDTHS[0], dark=dark)
        backgrounds.add(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
        for width in WIDTHS:
            tab.show(width, dark=dark)
            if tab.scrolls_sideways(width):
                yield f"{theme}, {width} px: scrolls sideways, because of {tab.widest()}"
            yield from (
                f"{theme}, {width} px: contrast {ratio:.2f} of {text}" for text, ratio in tab.low_contrasts("body")
            )
        yield from (f"{theme}: no picture {address}" for address in tab.missing_pictures())
        yield from (f"{theme}: {text}" for text in tab.problems if not text.startswith("console.log: "))
    if len(backgrounds) < 2:
        yield f"{page.name}: light and dark are the same"
