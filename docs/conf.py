"""The documentation site: `make site` builds it from the Markdown of this repository.

The navigation is that of docs/README.md: each section of it is a section of the site. Links to files that are no pages
lead to the repository if FASTVIT_SOURCE_URL says where it is, and to copies of the files if not.
"""

import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))  # Sphinx loads this file without its folder

from pages import FRONT, PAGES, PATTERNS, absolute_links, with_navigation

import fastvit_engine

project = "FastViT Engine"
author = "FastViT Engine contributors"
version = release = fastvit_engine.__version__
root_doc = "docs/README"
include_patterns = PATTERNS
# Sphinx looks into every folder that is not excluded.
exclude_patterns = [".*", "build", "data", "runs", "wheels", "tests", "fastvit_engine", "**/results"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_argparse_cli"]
myst_heading_anchors = 4
highlight_language = "text"  # of blocks without a language, which show output
default_role = "code"  # docstrings write code in single backticks
autodoc_inherit_docstrings = False  # what only PyTorch documents is left out
autodoc_member_order = "bysource"

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the search field is in the side bar
}


def _prepare(app: Sphinx, name: str, source: list[str]) -> None:
    path = Path(app.env.doc2path(name)).resolve()
    if path.suffix == ".md":
        text = absolute_links(
            source[0], path.parent, keep=lambda target: target in PAGES or target.suffix in (".png", ".jpg")
        )
        source[0] = with_navigation(text) if path == FRONT else text


def _front_page(app: Sphinx, error: Exception | None) -> None:
    """The site's own address leads to the front page, which is in a folder as in the repository."""
    if error is None and app.builder.format == "html":
        target = f"{root_doc}.html"
        (Path(app.outdir) / "index.html").write_text(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{project}</title>'
            f'<meta http-equiv="refresh" content="0; url={target}"><a href="{target}">{project}</a></html>\n'
        )


def setup(app: Sphinx) -> None:
    app.connect("source-read", _prepare)
    app.connect("build-finished", _front_page)
