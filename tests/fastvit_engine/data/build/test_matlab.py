"""Structs and rows of numbers that SciPy wrote come back, and anything else is refused."""

import io
import struct
import zlib

import numpy as np
import pytest

from fastvit_engine.data.build.sources.matlab import read_numbers, read_structs

savemat = pytest.importorskip("scipy.io").savemat
FIELDS = ("ILSVRC2012_ID", "WNID")


def _saved(rows, *, compressed=True, kind="f8", **others) -> bytes:
    """As ILSVRC2012's devkit has it: a column of structs, with fields that nobody asks for."""
    fields = [("ILSVRC2012_ID", kind), ("WNID", "O"), ("words", "O"), ("children", "O")]
    synsets = np.array([(number, wnid, "a, b", np.arange(3.0)) for number, wnid in rows], dtype=fields)
    buffer = io.BytesIO()
    savemat(buffer, {**others, "synsets": synsets.reshape(-1, 1)}, do_compression=compressed)
    return buffer.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", ["f8", "f4", "u1", "i2", "u2", "i4", "u4", "i8"])
def test_numbers_and_texts_come_back(kind, compressed):
    rows = [(1, "n02119789"), (2, "n02100735"), (100, "n1")]
    data = _saved(rows, kind=kind, compressed=compressed, first=np.eye(3), second="text")
    assert read_structs(data, "synsets", FIELDS) == rows
    assert read_structs(data, "synsets", FIELDS[::-1]) == [row[::-1] for row in rows]


def test_a_file_of_the_real_size():
    rows = [(number, f"n{number:08d}") for number in range(1, 1861)]
    assert read_structs(_saved(rows), "synsets", FIELDS) == rows


def _element(kind: int, content: bytes, order: str) -> bytes:
    if 0 < len(content) <= 4:  # MATLAB writes them so
        return struct.pack(f"{order}I", len(content) << 16 | kind) + content.ljust(4, b"\0")
    return struct.pack(f"{order}II", kind, len(content)) + content + bytes(-len(content) % 8)


def _matrix(kind: int, shape: tuple[int, int], name: bytes, content: bytes, order: str) -> bytes:
    flags, dimensions = struct.pack(f"{order}II", kind, 0), struct.pack(f"{order}ii", *shape)
    parts = _element(6, flags, order) + _element(5, dimensions, order) + _element(1, name, order)
    return _element(14, parts + content, order)


def _by_hand(order: str, count: int = 1, names: bytes = b"ID\0\0WNID") -> bytes:
    """As MATLAB packs it: doubles that are whole as bytes, text as UTF-16."""
    number = _matrix(6, (1, 1), b"", _element(2, bytes([7]), order), order)
    text = _matrix(4, (1, 3), b"", _element(4, "n12".encode({"<": "utf-16-le", ">": "utf-16-be"}[order]), order), order)
    fields = _element(5, struct.pack(f"{order}i", 4), order) + _element(1, names, order)
    variable = _matrix(2, (count, 1), b"synsets", fields + number + text, order)
    return bytes(124) + struct.pack(f"{order}HH", 0x100, 0x4D49) + variable


@pytest.mark.parametrize("order", ["<", ">"])
def test_either_byte_order_and_packed_numbers(order):
    assert read_structs(_by_hand(order), "synsets", ("ID", "WNID")) == [(7, "n12")]


def _compressed(content: bytes) -> bytes:
    packed = zlib.compress(content)
    return bytes(124) + b"\x00\x01IM" + struct.pack("<II", 15, len(packed)) + packed


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a MATLAB 5 file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(200), "not a MATLAB 5 file"),
        (_saved([(1, "n1")])[:-9], "ends within an element"),
        (_saved([(1, "n1")])[:128], "has no variable synsets"),
        (_saved([(1, ["n1", "n2"])]), "neither a number nor a text"),
        (_compressed(bytes(1 << 25)), "holds more than 16,777,216 bytes"),
        (_compressed(b""), "has no variable"),
        (_by_hand("<", count=2), "type 0 instead of 14"),
        (_by_hand("<", count=1 << 30), "at most 10,000 structs"),
        (_by_hand("<", count=-1), "negative dimension"),
        (_by_hand("<", names=b"ID\0\0WNI\0"), "have no field WNID"),
        (_by_hand("<", names=b"ID\0\0WNI"), "damaged names of fields"),
    ],
)
def test_anything_else_is_refused(data, message):
    fields = ("ID", "WNID") if b"ID\0\0WNI" in data else FIELDS
    with pytest.raises(ValueError, match=message):
        read_structs(data, "synsets", fields)


def test_damage_of_compressed_data_is_noticed():
    data = bytearray(_saved([(1, "n1"), (2, "n2")]))
    for at in range(136, len(data)):
        changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        with pytest.raises(ValueError, match="compressed data"):
            read_structs(bytes(changed), "synsets", FIELDS)


# ---- rows and columns of numbers


def _numbers(compressed: bool = True, **variables) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, variables, do_compression=compressed)
    return buffer.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", ["f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"])
def test_rows_and_columns_of_numbers_come_back(kind, compressed):
    values = [1, 0, 102, 7, 99]
    for shape in ((1, 5), (5, 1)):
        data = _numbers(compressed, first=np.eye(2), ids=np.array(values, kind).reshape(shape), last="text")
        assert read_numbers(data, "ids") == values
    assert read_numbers(_numbers(compressed, ids=np.array([[70_000, -3]], "i8")), "ids") == [70_000, -3]


def test_doubles_that_matlab_packs_as_bytes_and_either_byte_order():
    for order in "<>":
        row = _matrix(6, (1, 6), b"labels", _element(4, struct.pack(f"{order}6H", 1, 2, 3, 77, 300, 5), order), order)
        data = bytes(124) + struct.pack(f"{order}HH", 0x100, 0x4D49) + row
        assert read_numbers(data, "labels") == [1, 2, 3, 77, 300, 5]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.eye(3), "ids is no row or column"),
        (np.zeros((1, 2, 2)), "ids is no row or column"),
        ("text", "ids is no row or column"),
        (np.zeros((1, 1_000_001), np.uint8), "at most 1,000,000 numbers"),
        (np.array([[1.0, 2.5]]), "numbers that are not whole"),
        (np.array([[1.0, np.inf]]), "numbers that are not whole"),
        (np.array([[1.0, np.nan]]), "numbers that are not whole"),
        (np.array([[1.0, 2j]]), "does not have the numbers that it claims"),
    ],
)
def test_what_is_no_row_of_whole_numbers_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        read_numbers(_numbers(ids=values), "ids")
    with pytest.raises(ValueError, match="has no variable other"):
        read_numbers(_numbers(ids=values), "other")


def test_a_row_that_is_shorter_than_it_claims_is_refused():
    row = _matrix(6, (1, 7), b"labels", _element(4, struct.pack("<6H", 1, 2, 3, 4, 5, 6), "<"), "<")
    with pytest.raises(ValueError, match="does not have the numbers that it claims"):
        read_numbers(bytes(124) + b"\x00\x01IM" + row, "labels")
