"""Headers of tar archives that lie: each ends in one sentence, in bounded time and memory."""

import io
import subprocess
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvit_engine.data.shards.archive import DamagedShard, read_shard
from fastvit_engine.data.shards.index import write_index
from fastvit_engine.data.shards.sample import MAX_MEMBER_BYTES
from fastvit_engine.data.shards.tar import BLOCK, TarError, iterate_members
from fastvit_engine.errors import UserError
from tests.fastvit_engine.data.shards.tar_files import END, IMAGE, LABEL, LIES, header, pad, pax
from tests.in_full import IN_FULL


@pytest.mark.timeout(20)
@pytest.mark.parametrize("lie", LIES)
def test_lies_are_one_sentence(tmp_path: Path, lie: str) -> None:
    path = tmp_path / "lie.tar"
    path.write_bytes(LIES[lie])
    tracemalloc.start()
    with pytest.raises(UserError, match=r"^shard .*lie\.tar ") as by_index:
        write_index([str(path)], tmp_path / "x.index")
    with pytest.raises(DamagedShard, match=r"^shard .*lie\.tar is damaged") as by_stream:
        list(read_shard(str(path)))
    with pytest.raises(DamagedShard, match="is damaged"):
        list(read_shard(f"pipe:cat {path}"))
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()
    assert "\n" not in str(by_index.value) + str(by_stream.value)


def test_as_many_pax_headers_as_anybody_writes_are_read() -> None:
    content = pax(b"a=b") * 64 + IMAGE + END
    (member,) = iterate_members(lambda at, n: content[at : at + n], len(content))
    assert (member.name, member.start, member.size) == ("a.jpg", 0, 1)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("label", "message"),
    [
        (b"[" * 100_000, "which is not a class index"),
        (b" " * (17 << 20) + b"1", "a label 'cls' of 17,825,793 bytes"),
    ],
)
def test_absurd_labels(tmp_path: Path, label: bytes, message: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(IMAGE + header(b"a.cls", b"%011o" % len(label)) + pad(label) + END)
    with pytest.raises(UserError, match=message) as error:
        write_index([str(path)], tmp_path / "x.index")
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_a_member_that_no_memory_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:
        size = MAX_MEMBER_BYTES + 1
        file.write(IMAGE + LABEL + header(b"b.mp4", b"%011o" % size))
        file.seek(file.tell() + size + -size % BLOCK)  # a hole
        file.write(END)
    with pytest.raises(UserError, match=r"in sample 'b', a member of 2,147,483,649 bytes, which is too large"):
        write_index([str(path)], tmp_path / "x.index")
    with pytest.raises(DamagedShard, match="which is too large"):
        list(read_shard(str(path)))


def _whole() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("käse/" * 30 + "a.jpg", "b.jpg", "b.json"):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 700, 1.5
            tar.addfile(info, io.BytesIO(b"{}" * 350))
    return buffer.getvalue().rstrip(b"\0") + END


WHOLE = _whole()


@settings(max_examples=400 if IN_FULL else 80)
@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=20)), max_size=4),
    st.integers(0, len(WHOLE)),
)
def test_any_bytes_end_in_members_or_in_an_error(changes: list[tuple[int, bytes]], length: int) -> None:
    damaged = bytearray(WHOLE)
    for at, content in changes:
        damaged[at : at + len(content)] = content
    content = bytes(damaged[:length])
    try:
        members = list(iterate_members(lambda at, n: content[at : at + n], len(content)))
    except TarError as error:
        assert str(error)
    else:
        assert all(0 <= member.start < member.data <= member.end <= len(content) for member in members)


def _zeroed(tail: int) -> bytes:
    """An archive of twenty members of 10 kB, of which a lost disk has left the first `tail` bytes and zeros."""
    images = [header(b"%d.cls" % n, b"%011o" % 10_000) + pad(b"1" + b" " * 9_999) for n in range(20)]
    content = b"".join(images) + END
    content += bytes(-len(content) % 10240)
    return content[:tail] + bytes(len(content) - tail)


@pytest.mark.parametrize("kept", [0, 1, 10, 18], ids=lambda kept: f"{kept} of 20 members")
def test_zeros_in_place_of_members_are_damage(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(_zeroed(kept * (512 + 10_240)))
    with pytest.raises(UserError, match=r"a\.tar holds only zeros.*: copy or make it again") as by_index:
        write_index([str(path)], tmp_path / "x.index")
    assert kept == 0 or f"at byte {kept * 10_752:,}" in str(by_index.value)
    for shard in (str(path), f"pipe:cat {path}"):
        with pytest.raises(DamagedShard, match=r"is damaged \(it holds only zeros"):
            list(read_shard(shard))


@pytest.mark.parametrize("factor", [1, 20, 128, 2048, 32768])
def test_the_padding_of_any_archiver_is_taken(tmp_path: Path, factor: int) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    subprocess.run(["tar", "-b", str(factor), "-cf", "a.tar", "a.jpg"], cwd=tmp_path, check=True)
    assert (tmp_path / "a.tar").stat().st_size == max(1536 + 512, factor * 512)
    (sample,) = read_shard(str(tmp_path / "a.tar"))
    assert sample["jpg"] == b"x"
