"""Reads a page as a browser does, strictly."""

import base64
import hashlib
from html.parser import HTMLParser

_VOID = {"meta", "img", "br", "link", "input", "source"}


class Page(HTMLParser):
    """Parses a page; fails on tags that are not closed in order. `code`: its scripts, but for embedded data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.code: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"] and "type" not in self.tags[-1][1]:
            self.code.append(data)
        if self._open and self._open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)
        if "style" not in self._open and "script" not in self._open:
            self.text += data + " "

    def all(self, tag: str, class_name: str | None = None) -> list[dict[str, str | None]]:
        return [
            attributes
            for name, attributes in self.tags
            if name == tag and (class_name is None or class_name in (attributes.get("class") or "").split())
        ]

    def check(self) -> None:
        """What holds of every page: it fetches nothing, names its pictures, and runs no script but its own."""
        for tag, attributes in self.tags:
            assert tag not in ("link", "iframe", "object", "base", "image", "use", "form")
            assert not any(name.startswith("on") for name in attributes)
            for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert (attributes.get(name) or "data:").startswith("data:")
            if tag == "img":
                assert attributes.get("alt")
            if tag == "svg":
                assert attributes.get("aria-hidden") == "true" or attributes.get("aria-label")
        identifiers = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(set(identifiers)) == len(identifiers)
        (code,) = self.code
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        (policy,) = [tag["content"] for tag in self.all("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
        assert policy == (f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'")
