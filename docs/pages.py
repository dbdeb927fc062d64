"""The pages of the documentation site, their navigation, and links from a page to other files of the repository."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FRONT = ROOT / "docs" / "README.md"
# Patterns of Sphinx: `*` is any name within a folder.
PATTERNS = [
    "docs/*.md",
    "docs/*/*.md",
    "docs/*/*.rst",
    "kernels/*.md",
    "kernels/fastvit_kernels/*/README.md",
    "launch/README.md",
    "launch/*/README.md",
    "benchmarks/*.md",
    "examples/README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
]
PAGES = {path for pattern in PATTERNS for path in ROOT.glob(pattern)}

_CODE_OR_LINK = re.compile(
    r"^ *(?P<fence>```+).*?^ *(?P=fence) *$"
    r"|`[^`\n]+`"
    r"|(?P<image>!?)\[(?P<text>[^\[\]]*)\]\((?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)",
    re.MULTILINE | re.DOTALL,
)


def source_url() -> str | None:
    """The repository as a web page, up to the path of a file: https://HOST/OWNER/NAME/blob/REV. None if not known.

    It is what FASTVIT_SOURCE_URL says.
    """
    return os.environ.get("FASTVIT_SOURCE_URL", "").rstrip("/") or None


def absolute_links(text: str, folder: Path, keep: Callable[[Path], bool] = lambda target: False) -> str:
    """The Markdown `text` of a page in `folder`, with the address of every file and folder that it links to.

    keep: which targets stay relative. Addresses, anchors within the page and code stay as they are. Without
    FASTVIT_SOURCE_URL, a link to a file is one of MyST that downloads it, and a folder is named without a link. Raises
    FileNotFoundError for a link that leads nowhere.
    """
    base = source_url()

    def address(found: re.Match[str]) -> str:
        path, text, image = found["path"], found["text"], found["image"]
        if path is None or re.match(r"[a-z]+:", path):
            return found[0]
        target = (folder / path).resolve()
        if not target.exists():
            raise FileNotFoundError(f"{folder} has a page that links to {path}: no such file")
        if keep(target):
            return found[0]
        if base is None:
            return f"[{text}](path:{path})" if target.is_file() else text
        shown = base.replace("/blob/", "/raw/", 1) if image else base  # the file itself, not the page about it
        return f"{image}[{text}]({shown}/{target.relative_to(ROOT).as_posix()}{found['anchor'] or ''})"

    return _CODE_OR_LINK.sub(address, text)


def rewrite(checkout: Path) -> None:
    """Makes the links of both READMEs absolute in a copy of this checkout: a package index has none of the files.

    Raises SystemExit without FASTVIT_SOURCE_URL.
    """
    if source_url() is None:
        raise SystemExit("set FASTVIT_SOURCE_URL=https://HOST/OWNER/NAME/blob/TAG: where READMEs link to")
    for name in ("README.md", "kernels/README.md"):
        page = checkout / name
        page.write_text(absolute_links(page.read_text(), (ROOT / name).parent))


def navigation(text: str) -> dict[str, list[Path]]:
    """The sections of the front page, and the pages that each links to, in this order; each page once."""
    found: dict[str, list[Path]] = {}
    seen: set[Path] = set()
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        links = [(FRONT.parent / link).resolve() for link in re.findall(r"\]\(([^)\s#:]+)\)", section)]
        pages = [page for page in dict.fromkeys(links) if page in PAGES - seen]
        seen.update(pages)
        found[section.partition("\n")[0]] = pages
    return found


def with_navigation(text: str) -> str:
    """The front page for Sphinx, which builds the side bar from hidden lists of pages: one for each section."""
    lists = [
        "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *map(_document, pages), "```"])
        for caption, pages in navigation(text).items()
    ]
    return "\n\n".join([text, *lists, ""])


def _document(page: Path) -> str:
    return f"/{page.relative_to(ROOT).with_suffix('').as_posix()}"


if __name__ == "__main__":
    rewrite(Path(sys.argv[1]))
