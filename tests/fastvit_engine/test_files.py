"""Files are whole or absent, and JSON lines are whole, whoever writes and however it ends."""

import contextlib
import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastvit_engine import files
from fastvit_engine.files import append_json_lines, atomic_folder, atomic_write, atomic_writer, read_json_lines
from tests.in_full import IN_FULL


@contextlib.contextmanager
def full_disk_after(size: int) -> Iterator[None]:
    """Lets no file grow beyond `size` bytes: as on a full disk, what fits is written, and the rest refused."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def start_and_kill(code: str, *arguments: object) -> None:
    """Runs `code`, which prints a line when it is in the middle of its work, and kills it there."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        process.kill()


@pytest.mark.parametrize("content", ["größer\n", b"\x00\xff", ""])
def test_atomic_write_replaces_the_whole_file(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "file"
    path.write_text("something much longer than the new content")
    atomic_write(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(source: Path, target: Path) -> None:
        assert Path(source).parent == tmp_path  # a rename is atomic only within a file system
        assert Path(source).read_text() == "new"
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with full_disk_after(1000), pytest.raises(OSError, match="too large"):
        atomic_write(path, b"x" * 1001)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), atomic_writer(path) as file:
        file.write(b"new")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_durable_before_the_file_has_its_name_and_the_name_thereafter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    real_fsync, real_replace, done = os.fsync, os.replace, []

    def fsync(descriptor: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        done.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with atomic_writer(path) as file:
        file.write(b"content")
        temporary = file.name
        assert not path.exists()
    assert done == [temporary, "rename", str(tmp_path)]


def test_a_temporary_folder_of_the_callers_keeps_the_other_clean(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with atomic_writer(tmp_path / "file", temporary_folder=scratch):
        assert len(list(scratch.iterdir())) == 1 and list(tmp_path.iterdir()) == [scratch]
    assert list(scratch.iterdir()) == []


def _write_letter(path: Path, letter: str) -> None:
    for _ in range(50):
        atomic_write(path, letter * 300_000)


def test_readers_see_one_of_several_writers_files_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, "a" * 300_000)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        writers = [pool.submit(_write_letter, path, letter) for letter in "ab"]
        seen = set()
        while not all(writer.done() for writer in writers):
            content = path.read_text()
            assert len(content) == 300_000
            seen.add("".join(sorted(set(content))))
        for writer in writers:
            writer.result()
    assert seen <= {"a", "b"}
    assert list(tmp_path.iterdir()) == [path]


_KILLED_WRITER = """
import sys, time
from pathlib import Path
from fastvit_engine.files import atomic_writer
with atomic_writer(Path(sys.argv[1])) as file:
    file.write(b"half of it")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    start_and_kill(_KILLED_WRITER, path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    atomic_write(tmp_path / "other", "")
    assert len(list(tmp_path.iterdir())) == 3  # whose it is, only the file's own writer knows
    atomic_write(path, "new")
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "other"]


def test_what_others_are_writing_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    elsewhere = tmp_path / ".file.0123456789ab.999999999.01234567.tmp"  # of a machine whose processes nobody here knows
    elsewhere.write_text("half of it")
    with atomic_writer(path) as file:
        file.write(b"slow")
        atomic_write(path, "fast")
        assert path.read_text() == "fast"
    assert path.read_text() == "slow"
    assert sorted(tmp_path.iterdir()) == [elsewhere, path]
    os.utime(elsewhere, (time.time() - 2 * 86400,) * 2)
    atomic_write(path, "new")
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_with_all_its_files_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with pytest.raises(ValueError), atomic_folder(path) as folder:
        (folder / "a").write_text("1")
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(path) as folder:
        (folder / "a").write_text("1")
        assert not path.exists()
        with atomic_folder(path) as other:  # somebody faster
            (other / "a").write_text("2")
    assert (path / "a").read_text() == "2"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folders_files_are_durable_before_it_has_its_name_and_the_name_thereafter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    real_fsync, real_rename, done = os.fsync, os.rename, []

    def fsync(descriptor: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        done.append("rename")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    with atomic_folder(path) as folder:
        for name in ("a", "b"):
            (folder / name).write_text(name)
    assert sorted(done[:2]) == [str(folder / "a"), str(folder / "b")]
    assert done[2:] == [str(folder), "rename", str(tmp_path)]


def test_lines_come_back_as_appended(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    rows = [{"text": "a\nb\u2028c\x85"}, {"number": 1.5, "list": [1, None]}]
    append_json_lines(path, rows[:1])
    append_json_lines(path, rows[1:], durable=False)
    append_json_lines(path, [])
    assert read_json_lines(path) == rows
    assert path.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize(
    "torn", [b'{"number": 2', b"{", b"\0" * 5000, b'{"text": "' + b"x" * 200_000, b"\xff\xfe", b"2"]
)
def test_no_line_joins_half_a_line(tmp_path: Path, torn: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lines.jsonl"
    append_json_lines(path, [{"number": 1}])
    with open(path, "ab") as file:
        file.write(torn)
    assert read_json_lines(path) == [{"number": 1}]
    append_json_lines(path, [{"number": 3}])
    append_json_lines(path, [{"number": 4}])
    assert path.read_text() == '{"number": 1}\n{"number": 3}\n{"number": 4}\n'
    assert capsys.readouterr().err == f"fastvit: {path} ended in half a line, {len(torn)} bytes, which were removed\n"


def test_a_hole_of_a_lost_disk_is_removed_without_reading_it_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_json_lines(path, [{"number": 1}])
    os.truncate(path, 200 * 2**20)
    append_json_lines(path, [{"number": 2}])
    assert read_json_lines(path) == [{"number": 1}, {"number": 2}]


def test_an_object_that_lacks_only_its_newline_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"number": 1}\n{"number": 2}')
    assert read_json_lines(path) == [{"number": 1}, {"number": 2}]
    append_json_lines(path, [{"number": 3}])
    assert read_json_lines(path) == [{"number": 1}, {"number": 2}, {"number": 3}]
    assert capsys.readouterr().err == ""


def test_a_full_disk_appends_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_json_lines(path, [{"number": 1}])
    before = path.read_bytes()
    with full_disk_after(len(before) + 20), pytest.raises(OSError) as raised:
        append_json_lines(path, [{"number": 2}, {"number": 3}])  # of which the first would fit
    assert raised.value.errno == errno.EFBIG
    assert path.read_bytes() == before
    append_json_lines(path, [{"number": 4}])
    assert read_json_lines(path) == [{"number": 1}, {"number": 4}]


def test_a_value_that_json_lacks_appends_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    with pytest.raises(ValueError):
        append_json_lines(path, [{"number": 1}, {"number": float("nan")}])
    assert not path.exists()


def test_a_killed_appender_never_spoils_the_lines_of_others(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    code = """
import sys
from pathlib import Path
from fastvit_engine.files import append_json_lines
for number in range(10**9):
    append_json_lines(Path(sys.argv[1]), [{"text": "x" * 20_000, "number": number}] * 20, durable=False)
    if number == 5:
        print("writing", flush=True)
"""
    for number in range(3):
        start_and_kill(code, path)
        append_json_lines(path, [{"survivor": number}])
    rows = read_json_lines(path)
    assert [row["survivor"] for row in rows if "survivor" in row] == [0, 1, 2]
    assert path.read_bytes().endswith(b"}\n")


def _append(path: Path, writer: int) -> None:
    for number in range(200):
        append_json_lines(path, [{"writer": writer, "number": number, "text": "x" * 3000}], durable=False)


def test_lines_of_several_processes_never_mix_even_after_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"writer": 0, "numb')
    with ProcessPoolExecutor(3) as pool:
        list(pool.map(_append, [path] * 3, range(3)))
    written = [(row["writer"], row["number"]) for row in read_json_lines(path)]
    assert sorted(written) == [(writer, number) for writer in range(3) for number in range(200)]


def test_a_stopped_process_that_holds_the_lock_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LOCK_SECONDS", 0.2)
    path = tmp_path / "lines.jsonl"
    code = """
import fcntl, sys, time
file = open(sys.argv[1], "ab")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        append_json_lines(path, [{"number": 1}])
        assert 0.2 < time.monotonic() - start < 5
        process.kill()
    assert read_json_lines(path) == [{"number": 1}]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{oops", "is not JSON"),
        (b"", "is not JSON"),
        (b"[1]", "is not a JSON object"),
        (b"null", "is not a JSON object"),
        (b"\0\0\0", "is not JSON"),
        (b"\xff{}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"number": ' + b"9" * 10_000 + b"}", "is not JSON"),
        (b'{"number": 1}{"number": 2}', "is not JSON"),
        (b'{"text": "' + b"x" * 2**24 + b'"}', "is too long"),
        (b"\0" * 2**26, "is too long"),
    ],
)
def test_other_damage_is_left_out_and_counted(
    tmp_path: Path, line: bytes, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"number": 1}\n' + line + b'\n{"number": 3}\n')
    assert read_json_lines(path) == [{"number": 1}, {"number": 3}]
    assert capsys.readouterr().err == f"fastvit: {path} line 2 {problem}: left out\n"
    with open(path, "ab") as file:
        file.write(b"\n\n{")
    append_json_lines(path, [{"number": 4}])
    capsys.readouterr()
    assert read_json_lines(path, lambda row: "is odd" if row["number"] == 3 else None) == [{"number": 1}, {"number": 4}]
    assert capsys.readouterr().err == f"fastvit: {path} line 2 {problem}, and 3 more: left out\n"


def test_a_long_line_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_json_lines(path, [{"number": 1}])
    os.truncate(path, 2**29)  # a hole
    with open(path, "ab") as file:
        file.write(b'\n{"number": 2}\n')
    tracemalloc.start()
    assert read_json_lines(path) == [{"number": 1}, {"number": 2}]
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


@settings(max_examples=300 if IN_FULL else 60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.lists(
        st.one_of(st.binary(max_size=30), st.sampled_from([b"\n", b"{", b"}", b'{"a": 1}', b"[", b"\0", b'"', b"\r\n"]))
    )
)
def test_any_bytes_are_read_and_appending_adds_one_line(tmp_path: Path, content: list[bytes]) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"".join(content))
    before = read_json_lines(path)
    assert len(before) <= b"".join(content).count(b"{")
    append_json_lines(path, [{"new": 1}], durable=False)
    assert read_json_lines(path) == [*before, {"new": 1}]
