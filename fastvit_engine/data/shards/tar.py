"""Members of a tar archive by their headers: POSIX ustar, pax and GNU long names.

The standard library's tarfile takes a damaged header for the end of the archive and needs an open file. Here damage is
an error that names the byte, and anything that gives bytes at an offset will do: a file, a pipe, the bytes of a sample.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512
_ZERO_BLOCK = bytes(BLOCK)
_LONGEST_EXTENSION = 1 << 20  # bytes of a pax header or a long name; more is damage
_MOST_EXTENSIONS = 64  # pax headers and long names before one member; archivers write three at most
_RECORD = 20 * BLOCK  # archivers fill the last record with zeros; most write records of this size,
_LARGEST_RECORD = 1 << 24  # others of a power of two, up to this

# Of a header: name, size, checksum, kind, magic, prefix.
_HEADER = struct.Struct("100s24x12s12x8sc100x6s82x155s12x")
_DECIMAL = re.compile(r"[0-9]{1,19}")

ReadAt = Callable[[int, int], bytes]  # (offset, length) to at most that many bytes; fewer only at the end


class TarError(Exception):
    """What is wrong with an archive, and at which byte unless it is the archive as a whole."""

    def __init__(self, problem: str, byte: int | None = None) -> None:
        super().__init__(problem, byte)  # which pickle hands over to another process

    def __str__(self) -> str:
        problem, byte = self.args
        return problem if byte is None else f"{problem} at byte {byte:,}"


class Member(NamedTuple):
    """A member of an archive, by its headers."""

    name: str
    start: int  # of the first header block that belongs to it
    data: int  # of its content
    size: int  # bytes of content
    is_file: bool  # and not a folder, link or device

    @property
    def end(self) -> int:
        return self.data + _padded(self.size)


def read_member(read: ReadAt, offset: int, archive_size: int | None) -> Member | None:
    """The member whose headers begin at `offset`, or None at the archive's end marker.

    `archive_size`: bytes; None if nobody knows yet (a pipe), in which case the content may turn out to be cut short.
    Raises TarError on damage. A call reads at most 64 headers, with 1 MB for each, and always moves forward.
    """
    start, long_name, long_size, extensions = offset, None, None, 0
    while True:
        header = read(offset, BLOCK)
        if len(header) < BLOCK:
            raise TarError("is truncated: there is no end marker", offset)
        if header == _ZERO_BLOCK:
            if offset != start:
                raise TarError("has a long name that no member follows", start)
            return None
        name, size_field, checksum, kind, magic, prefix = _HEADER.unpack(header)
        try:
            size = _number(size_field)
            if not _checksum_holds(header, _number(checksum)):
                raise ValueError
        except ValueError:
            raise TarError("has a damaged header", offset) from None
        data = offset + BLOCK
        if kind not in b"xgLK":
            break
        extensions += 1
        if extensions > _MOST_EXTENSIONS:
            raise TarError("has a chain of long names or pax headers that no member follows,", start)
        extension = read(data, size) if size <= _LONGEST_EXTENSION else b""
        if len(extension) < size:
            raise TarError("is truncated or has a damaged header", offset)
        if kind == b"L":
            long_name = _text(extension.rstrip(b"\0"))
        elif kind in b"xg":
            records = _pax_records(extension, offset)
            if kind == b"g" and records.keys() & {"path", "size"}:
                raise TarError("has a global pax header that renames its members", offset)
            if any(key.startswith("GNU.sparse") for key in records):
                raise TarError("has a sparse member, which cannot be read in place,", offset)
            if kind == b"x":
                long_name = records.get("path", long_name)
                long_size = _pax_size(records["size"], offset) if "size" in records else long_size
        offset = data + _padded(size)
    if kind not in b"0\x001234567":
        raise TarError(f"has a member of the unknown type {kind!r}", offset)
    is_file = kind in b"0\x007"
    size = (size if long_size is None else long_size) if is_file else 0
    if archive_size is not None and data + size > archive_size:
        raise TarError("is truncated in the member that begins", start)
    return Member(_header_name(name, magic, prefix) if long_name is None else long_name, start, data, size, is_file)


def iterate_members(read: ReadAt, archive_size: int | None) -> Iterator[Member]:
    """The members of a whole archive in stored order.

    Raises TarError on damage, for data after the end marker, and for more zeros there than an archiver writes: a lost
    disk leaves zeros in place of the members that it had not written yet.
    """
    if not read(0, 1):
        raise TarError("is an empty file")
    offset = 0
    while (member := read_member(read, offset, archive_size)) is not None:
        yield member
        offset = member.end
    end = offset
    while rest := read(offset, 1 << 20):  # a zeroed header looks like the end: only padding may follow the real one
        if data := rest.lstrip(b"\0"):
            raise TarError("has data after its end marker,", offset + len(rest) - len(data))
        offset += len(rest)
    if archive_size is not None and offset < archive_size:
        raise TarError("was cut short while it was read,", offset)
    if not _is_padding(offset - end, offset):
        raise TarError(f"holds only zeros, {offset - end:,} bytes of them," if end else "holds only zeros", end or None)


def _is_padding(zeros: int, size: int) -> bool:
    """Whether an archiver writes so many zeros, end marker included, at the end of an archive of `size` bytes."""
    if zeros < 2 * BLOCK + _RECORD:
        return True
    record = min(size & -size, _LARGEST_RECORD)  # the largest power of two that divides the size
    return zeros < size and zeros < 2 * BLOCK + record


def windowed(read: ReadAt, window: int) -> ReadAt:
    """`read` that fetches at least `window` bytes at a time: headers of neighbouring members come in one read."""
    begin, kept = 0, b""

    def read_through(at: int, length: int) -> bytes:
        nonlocal begin, kept
        if not begin <= at <= at + length <= begin + len(kept):
            begin, kept = at, read(at, max(length, window))
        return kept[at - begin : at - begin + length]

    return read_through


def _padded(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK * BLOCK


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _header_name(name: bytes, magic: bytes, prefix: bytes) -> str:
    name = name.partition(b"\0")[0]
    if prefix[0] and magic == b"ustar\0":  # GNU's own format has other fields instead of the prefix
        name = prefix.partition(b"\0")[0] + b"/" + name
    return _text(name)


def _number(field: bytes) -> int:
    """A number of a header. Raises ValueError for negative ones, which no field here may have."""
    if field[0] & 0x80:  # GNU's form for numbers too large for octal digits
        if field[0] & 0x40:
            raise ValueError("negative")
        return int.from_bytes(field, "big") - (1 << (8 * len(field) - 1))
    digits = field.partition(b"\0")[0].strip() or b"0"
    if not digits.isdigit():  # which `int` is not as strict about
        raise ValueError("not octal")
    return int(digits, 8)


def _checksum_holds(header: bytes, checksum: int) -> bool:
    others = header[:148] + b" " * 8 + header[156:]
    # The lower half of Adler-32 is one more than the sum, modulo 65521, and takes a twentieth of the time of `sum`.
    if (checksum + 1) % 65521 == zlib.adler32(others) & 0xFFFF:
        return True
    # Some old archivers added the bytes as signed numbers.
    return checksum == sum(byte - 256 if byte > 127 else byte for byte in others)


def _pax_size(text: str, offset: int) -> int:
    if not _DECIMAL.fullmatch(text):
        raise TarError(f"has a pax header with the size {text[:30]!r}", offset)
    return int(text)


def _pax_records(extension: bytes, offset: int) -> dict[str, str]:
    r"""Records of the form b"length key=value\n"."""
    records = {}
    at = 0
    while at < len(extension):
        match = re.match(rb"(\d{1,7}) ([^=]+)=", extension[at : at + 256])
        length = int(match[1]) if match else 0
        # A length that ends within its own key would read the same record again, or half of the next one.
        if match is None or length <= match.end() or extension[at : at + length][length - 1 :] != b"\n":
            raise TarError("has a damaged pax header", offset)
        records[_text(match[2])] = _text(extension[at + match.end() : at + length - 1])
        at += length
    return records
