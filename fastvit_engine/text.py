"""Reads text files that people bring: lists, tables, class names, labels."""

import codecs
import io
from typing import BinaryIO, Literal, Protocol, TextIO

_MARKS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class Opened(Protocol):
    """A pathlib.Path, or what opens a file as one does."""

    def open(self, mode: Literal["rb"]) -> BinaryIO: ...


def open_text(path: Opened, *, newline: str | None = None) -> TextIO:
    """Opens UTF-8, with or without a byte-order mark, or UTF-16 or UTF-32 with one.

    Raises OSError, and UnicodeDecodeError when other text is read or for zero bytes, which no text has.
    """
    with path.open("rb") as file:
        head = file.read(1024)
    encoding = next((encoding for mark, encoding in _MARKS if head.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and b"\0" in head:
        raise UnicodeDecodeError("utf-8", head, head.index(b"\0"), head.index(b"\0") + 1, "zero byte in text")
    return io.TextIOWrapper(path.open("rb"), encoding=encoding, newline=newline)


def read_text(path: Opened) -> str:
    """The whole text of a file, with newlines at the ends of lines. Raises as `open_text`."""
    with open_text(path) as file:
        return file.read()


def read_lines(path: Opened) -> list[str]:
    """The lines of a text file that are not blank, without the space around them. Raises as `open_text`."""
    return [line for text in read_text(path).split("\n") if (line := text.strip())]
