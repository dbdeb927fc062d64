"""Samples in an archive: which members belong together, under which key, and what is passed over."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from fastvit_engine.data.shards.tar import Member, ReadAt, TarError, iterate_members, read_member
from fastvit_engine.shown import public_url

Sample = dict[str, Any]  # "__key__", "__url__" (a public one), and the bytes of each member by lower-case extension

MAX_MEMBER_BYTES = 1 << 31  # a sample is held in memory

Ignored = Counter[str]  # files that belong to no sample, by reason
_MACOS = "macOS resource files (._*, __MACOSX/)"
_UNNAMED = "files without a key or an extension"


class SampleFile(NamedTuple):
    """A file of an archive that belongs to a sample."""

    key: str
    extension: str
    member: Member
    first: bool  # of its sample


def split_name(name: str) -> tuple[str, str] | None:
    """(sample key, member extension in lower case) of a member's name, as WebDataset splits them; None for neither.

    The key is the path up to the first dot of the file name: "a/b.seg.png" is the member "seg.png" of "a/b".
    """
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot and not is_macos_resource(name) else None


def is_macos_resource(name: str) -> bool:
    """Whether a file is one of those in which macOS keeps attributes of others (AppleDouble)."""
    return name.startswith("__MACOSX/") or "/__MACOSX/" in name or name.rpartition("/")[2].startswith("._")


def describe_ignored(ignored: Ignored) -> str:
    """A clause that says how many files were passed over, and why; "" if none were."""
    return "".join(f", {count:,} {reason} ignored" for reason, count in sorted(ignored.items()))


def iterate_files(read: ReadAt, archive_size: int | None, ignored: Ignored) -> Iterator[SampleFile]:
    """The files of a whole archive that belong to samples, in stored order; others are counted in `ignored`.

    Raises TarError on damage, for a sample whose members lie apart from each other, for a member that occurs twice, for
    one whose extension begins with "__" and for one of more than MAX_MEMBER_BYTES.
    """
    seen: set[str] = set()
    extensions: set[str] = set()  # of the current sample
    key: str | None = None
    for member in iterate_members(read, archive_size):
        if not member.is_file:
            continue
        name = split_name(member.name)
        if name is None:
            ignored[_MACOS if is_macos_resource(member.name) else _UNNAMED] += 1
            continue
        first = name[0] != key
        if first:
            key, extensions = name[0], set()
            if key in seen:
                raise TarError(f"has members of sample {key!r} apart from each other: one more", member.start)
            seen.add(key)
        if name[1] in extensions:
            raise TarError(f"has the member {name[1]!r} of sample {key!r} twice, the second time", member.start)
        _check_extension(name[1], key, member)
        if member.size > MAX_MEMBER_BYTES:
            raise TarError(
                f"has, in sample {key!r}, a member of {member.size:,} bytes, which is too large", member.start
            )
        extensions.add(name[1])
        yield SampleFile(name[0], name[1], member, first)


def _check_extension(extension: str, key: str | None, member: Member) -> None:
    """Raises TarError for a member that would take the place of the sample's "__key__" or "__url__"."""
    if extension.startswith("__"):
        raise TarError(
            f"has, in sample {key!r}, the member {extension!r}, but names with '__' in front are reserved,",
            member.start,
        )


def read_samples(read: ReadAt, archive_size: int | None, shard: str, ignored: Ignored) -> Iterator[Sample]:
    """The samples of a whole archive in stored order; see `iterate_files`."""
    sample: Sample = {}
    for file in iterate_files(read, archive_size, ignored):
        if file.first:
            if sample:
                yield sample
            sample = {"__key__": file.key, "__url__": public_url(shard)}
        content = read(file.member.data, file.member.size)
        if len(content) < file.member.size:
            raise TarError("is truncated in the member that begins", file.member.start)
        sample[file.extension] = content
    if sample:
        yield sample


def parse_sample(content: bytes, shard: str) -> Sample:
    """The sample whose extent in `shard` has this content. Raises TarError if it is not one whole sample."""
    sample: Sample = {"__url__": public_url(shard)}
    offset, size = 0, len(content)

    def read(at: int, length: int) -> bytes:
        return content[at : at + length]

    while offset < size and (member := read_member(read, offset, size)) is not None:
        name = split_name(member.name)
        if member.is_file and name:
            if sample.setdefault("__key__", name[0]) != name[0]:
                raise TarError("has members of another sample")
            _check_extension(name[1], name[0], member)
            sample[name[1]] = content[member.data : member.data + member.size]
        offset = member.end
    if "__key__" not in sample:
        raise TarError("has no member")
    return sample
