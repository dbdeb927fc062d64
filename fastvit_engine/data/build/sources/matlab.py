"""Reads structs and whole numbers from MATLAB 5 files, as far as ILSVRC2012 and Flowers-102 need it."""

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

_MOST_BYTES = 1 << 24  # after decompression; the real file has under 2 MB
_MOST_VARIABLES, _MOST_STRUCTS, _MOST_FIELDS = 100, 10_000, 32  # the real file has 1 of 1,860 structs of 8 fields
_MOST_NUMBERS = 1_000_000  # the real files have up to 8,189

# Types of elements, and classes of arrays, of the MAT-file format's level 5.
_NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q"}
_TEXTS = {1: "ascii", 2: "ascii", 4: "utf-16", 16: "utf-8", 17: "utf-16"}
_INT8, _INT32, _UINT32, _MATRIX, _COMPRESSED = 1, 5, 6, 14, 15
_STRUCT, _CHAR, _DOUBLE, _UINT64 = 2, 4, 6, 15


class _Array(NamedTuple):
    kind: int  # a class of arrays
    shape: tuple[int, ...]
    name: bytes
    content: Iterator[tuple[int, memoryview]]  # the elements with its values


def read_structs(data: bytes, name: str, fields: Sequence[str]) -> list[tuple[float | str, ...]]:
    """The given fields, each one number or text, of every struct in the variable `name`.

    Raises ValueError, whose text continues "it cannot be read:", for anything else. Time and memory are bounded.
    """
    array, order = _variable(data, name)
    return _structs(array, fields, order)


def read_numbers(data: bytes, name: str) -> list[int]:
    """The whole numbers in the variable `name`, a row or a column of any numeric type; raises as `read_structs`."""
    array, order = _variable(data, name)
    count = math.prod(array.shape)
    if not _DOUBLE <= array.kind <= _UINT64 or count != max(array.shape) or count > _MOST_NUMBERS:
        raise ValueError(f"{name} is no row or column of at most {_MOST_NUMBERS:,} numbers")
    kind, values = next(array.content, (0, memoryview(b"")))
    if kind not in _NUMBERS or len(values) != count * struct.calcsize(_NUMBERS[kind]) or next(array.content, None):
        raise ValueError(f"{name} does not have the numbers that it claims")
    numbers = struct.unpack(f"{order}{count}{_NUMBERS[kind]}", values)
    if not all(float(number).is_integer() for number in numbers):
        raise ValueError(f"{name} has numbers that are not whole")
    return [int(number) for number in numbers]


def _variable(data: bytes, name: str) -> tuple[_Array, str]:
    """The array of a variable, and the byte order of the file."""
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    if order is None:
        raise ValueError("it is not a MATLAB 5 file")
    left = _MOST_BYTES
    for kind, content in islice(_elements(memoryview(data)[128:], order), _MOST_VARIABLES):
        if kind == _COMPRESSED:
            content = memoryview(_decompress(content, left))
            left -= len(content)
            kind, content = next(_elements(content, order), (0, content))
        if kind == _MATRIX:
            array = _array(content, order)
            if array.name == name.encode():
                return array, order
    raise ValueError(f"it has no variable {name}")


def _decompress(content: memoryview, most: int) -> bytes:
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(content, most + 1)
    except zlib.error as error:
        raise ValueError(f"damaged compressed data ({error})") from error
    if len(found) > most:
        raise ValueError(f"it holds more than {_MOST_BYTES:,} bytes")
    if not stream.eof:
        raise ValueError("its compressed data end too early")
    return found


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """(type, content) of one element after the other."""
    at = 0
    while at < len(data):
        if at + 8 > len(data):
            raise ValueError("it ends within an element")
        kind, size = struct.unpack_from(f"{order}II", data, at)
        start, after = at + 8, at + 8 + size
        if kind >> 16:  # up to four bytes, which share the second half of the tag
            kind, size = kind & 0xFFFF, kind >> 16
            start, after = at + 4, at + 8
            if size > 4:
                raise ValueError(f"a short element claims {size} bytes")
        elif kind != _COMPRESSED:
            after += -size % 8
        if start + size > len(data):
            raise ValueError("it ends within an element")
        yield kind, data[start : start + size]
        at = after


def _array(content: memoryview, order: str) -> _Array:
    elements = _elements(content, order)
    flags = _take(elements, _UINT32)
    dimensions = _take(elements, _INT32)
    if len(flags) != 8 or not 8 <= len(dimensions) <= 128 or len(dimensions) % 4:
        raise ValueError("an array without class or dimensions")
    sizes = struct.unpack(f"{order}{len(dimensions) // 4}i", dimensions)
    if min(sizes) < 0:
        raise ValueError("an array with a negative dimension")
    kind = struct.unpack(f"{order}II", flags)[0] & 0xFF
    return _Array(kind, sizes, bytes(_take(elements, _INT8)), elements)


def _take(elements: Iterator[tuple[int, memoryview]], kind: int) -> memoryview:
    found, content = next(elements, (0, memoryview(b"")))
    if found != kind:
        raise ValueError(f"an element of type {found} instead of {kind}")
    return content


def _structs(array: _Array, fields: Sequence[str], order: str) -> list[tuple[float | str, ...]]:
    if array.kind != _STRUCT or math.prod(array.shape) > _MOST_STRUCTS:
        raise ValueError(f"no array of at most {_MOST_STRUCTS:,} structs")
    width = _take(array.content, _INT32)
    names = bytes(_take(array.content, _INT8))
    length = struct.unpack(f"{order}i", width)[0] if len(width) == 4 else 0
    if length < 1 or len(names) % length or len(names) // length > _MOST_FIELDS:
        raise ValueError("damaged names of fields")
    present = [names[at : at + length].partition(b"\0")[0].decode("latin-1") for at in range(0, len(names), length)]
    missing = [field for field in fields if field not in present]
    if missing:
        raise ValueError(f"its structs have no field {missing[0]}")
    found = []
    for _ in range(math.prod(array.shape)):
        values = {field: _take(array.content, _MATRIX) for field in present}
        found.append(tuple(_value(values[field], order) for field in fields))
    return found


def _value(content: memoryview, order: str) -> float | str:
    """The number or the text in an array."""
    array = _array(content, order)
    kind, values = next(array.content, (0, memoryview(b"")))
    if array.kind == _CHAR and array.shape[0] == 1 and kind in _TEXTS:  # one row
        encoding = _TEXTS[kind] + ({"<": "-le", ">": "-be"}[order] if kind in (4, 17) else "")
        return bytes(values).decode(encoding)  # UnicodeDecodeError is a ValueError
    if _DOUBLE <= array.kind <= _UINT64 and kind in _NUMBERS and math.prod(array.shape) == 1:
        number = struct.Struct(order + _NUMBERS[kind])
        if len(values) == number.size:
            return float(number.unpack(values)[0])
    raise ValueError("a field that is neither a number nor a text")
