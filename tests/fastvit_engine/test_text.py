"""Text as editors on any system save it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvit_engine.text import open_text, read_lines, read_text

_ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]
_TEXT = st.text(st.characters(exclude_characters="\0\r\ufeff", exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("text") / "a.txt"


@settings(deadline=None)
@given(text=_TEXT, encoding=st.sampled_from(_ENCODINGS), newline=st.sampled_from(["\n", "\r\n"]))
def test_text_is_the_same_in_any_encoding(path, text, encoding, newline):
    path.write_bytes(text.replace("\n", newline).encode(encoding))
    assert read_text(path) == text


@pytest.mark.parametrize("mark", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_byte_orders(path, mark):
    path.write_bytes("\ufeffänt\nbee".encode(mark))
    assert read_lines(path) == ["änt", "bee"]


def test_lines_are_split_at_newlines_only(path):
    path.write_text("\ufeff a\u2028b\n\n  \nc\x0cd\r\n", encoding="utf-8", newline="")
    assert read_lines(path) == ["a\u2028b", "c\x0cd"]


@pytest.mark.parametrize("content", ["ä".encode("latin-1"), "ant".encode("utf-16-le"), b"a\0"])
def test_what_is_no_text_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(UnicodeDecodeError):
        read_text(path)
    with pytest.raises(UnicodeDecodeError), open_text(path) as file:
        list(file)
