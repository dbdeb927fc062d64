"""Members of a tar archive by their headers: POSIX ustar, pax and GNU long names.

tarfile takes a damaged header for the end of the archive and needs an open file; here damage is an error with its byte,
and anything that gives bytes at an offset will do: a file that is indexed, or the bytes of one sample.
"""

import re
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512
_ZERO_BLOCK = bytes(BLOCK)
_LONGEST_EXTENSION = 1 << 20  # bytes of a pax header or a long name; more is damage

ReadAt = Callable[[int, int], bytes]  # (offset, length) to at most that many bytes, fewer at the end only


class TarError(Exception):
    """What is wrong with an archive, and the byte where, if it is not the whole."""

    def __init__(self, problem: str, byte: int | None = None) -> None:
        super().__init__(problem, byte)  # which pickle hands over to another process

    def __str__(self) -> str:
        problem, byte = self.args
        return problem if byte is None else f"{problem} at byte {byte:,}"


class Member(NamedTuple):
    name: str
    start: int  # of the first header block that belongs to it
    data: int  # of its content
    size: int  # bytes of content
    is_file: bool  # and not a folder, link or device

    @property
    def end(self) -> int:
        return self.data + _padded(self.size)


def read_member(read: ReadAt, offset: int, archive_size: int) -> Member | None:
    """The member whose headers begin at `offset`, None where the archive's end marker does. TarError on damage."""
    start, long_name, long_size = offset, None, None
    while True:
        header = read(offset, BLOCK)
        if len(header) < BLOCK:
            raise TarError("is truncated: there is no end marker", offset)
        if header == _ZERO_BLOCK:
            if offset != start:
                raise TarError("has a long name that no member follows", start)
            return None
        kind = header[156:157]
        try:
            size = _number(header[124:136])
            if not _checksum_holds(header):
                raise ValueError
        except ValueError:
            raise TarError("has a damaged header", offset) from None
        data = offset + BLOCK
        if kind not in b"xgLK":
            break
        if size > _LONGEST_EXTENSION or data + size > archive_size:
            raise TarError("is truncated or has a damaged header", offset)
        extension = read(data, size)
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
                long_size = int(records["size"]) if "size" in records else long_size
        offset = data + _padded(size)
    if kind not in b"0\x001234567":
        raise TarError(f"has a member of the unknown type {kind!r}", offset)
    is_file = kind in b"0\x007"
    size = (size if long_size is None else long_size) if is_file else 0
    if data + size > archive_size:
        raise TarError("is truncated in the member that begins", start)
    return Member(_header_name(header) if long_name is None else long_name, start, data, size, is_file)


def split_name(name: str) -> tuple[str, str] | None:
    """(sample key, member extension in lower case) of a member's name, as WebDataset splits them; None for neither.

    The key is the path up to the first dot of the file name: "a/b.seg.png" is the member "seg.png" of "a/b".
    """
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else None


def iterate_files(content: bytes) -> Iterator[tuple[str, str, bytes]]:
    """(sample key, extension, bytes) of the files in a piece of an archive that begins and ends between members."""
    offset, size = 0, len(content)

    def read(at: int, length: int) -> bytes:
        return content[at : at + length]

    while offset < size and (member := read_member(read, offset, size)) is not None:
        name = split_name(member.name)
        if member.is_file and name:
            yield *name, content[member.data : member.data + member.size]
        offset = member.end


def _padded(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK * BLOCK


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _header_name(header: bytes) -> str:
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    posix = header[257:263] == b"ustar\0"  # GNU's own format has other things in place of the prefix
    return _text(prefix + b"/" + name if posix and prefix else name)


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU's form for numbers too large for octal digits
        return int.from_bytes(field, "big") - (1 << (8 * len(field) - 1))
    return int(field.strip(b" \0") or b"0", 8)


def _checksum_holds(header: bytes) -> bool:
    checksum = _number(header[148:156])
    others = header[:148] + b" " * 8 + header[156:]
    # The lower half of Adler-32 is one more than the sum, modulo 65521, and takes a twentieth of the time of `sum`.
    if (checksum + 1) % 65521 == zlib.adler32(others) & 0xFFFF:
        return True
    # Some old archivers added the bytes as signed numbers.
    return checksum == sum(byte - 256 if byte > 127 else byte for byte in others)


def _pax_records(extension: bytes, offset: int) -> dict[str, str]:
    """Records of the form b"length key=value\\n"."""
    records = {}
    at = 0
    while at < len(extension):
        match = re.match(rb"(\d{1,7}) ([^=]+)=", extension[at : at + 256])
        length = int(match[1]) if match else 0
        if match is None or at + length > len(extension) or extension[at + length - 1 : at + length] != b"\n":
            raise TarError("has a damaged pax header", offset)
        records[_text(match[2])] = _text(extension[at + match.end() : at + length - 1])
        at += length
    return records
