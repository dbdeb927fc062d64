"""The one way to write a file: whole or not at all, and JSON lines that a kill or a full disk cannot tear.

What is guaranteed, on a file system that keeps what fsync has written:

* `atomic_write`, `atomic_writer`, `atomic_folder`: whoever opens the path finds the old content or all of the new, at
  any moment, also after a power failure. When the call returns, the new content is durable. Of several writers at once
  the last file wins, and the first folder. A writer that fails removes its temporary file; what a killed one leaves
  behind, the next writer of the same path removes.
* `append_json_lines`: all lines of a call are appended, or none if it raises. Appenders in other processes and on other
  machines wait for each other if the file system has locks. Half a line, left by a killed writer or a power failure, is
  cut off before the next line is written, so no line ever joins it; that is said once.
* `read_json_lines`: half a line at the end is left out; so is every other damaged line, which is said once.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fastvit_engine.shown import say

_LOCK_SECONDS = 5.0  # a process stopped while it holds the lock must not stop all others
_LONGEST_LINE = 2**24  # bytes of JSON that are worth parsing
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}
_BLOCK = 2**16  # bytes
_ABANDONED_SECONDS = 86400.0  # a temporary file of an unknown machine that has not grown for so long has no writer


def atomic_write(path: Path, content: str | bytes) -> None:
    """Replaces the content of `path` by `content` (text as UTF-8), durably. See the module for what is guaranteed."""
    with atomic_writer(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def atomic_create(path: Path, content: bytes) -> bool:
    """Creates `path` with all of `content`, durably. Returns False if it exists: of several at once, one succeeds."""
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:  # a file system without hard links
            if error.errno not in _NO_LINKS:
                raise
            try:
                with open(path, "xb") as file:
                    file.write(content)
            except FileExistsError:
                return False
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    flush_to_disk(path.parent)
    return True


@contextlib.contextmanager
def atomic_writer(path: Path, *, temporary_folder: Path | None = None) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends, and disappears if the block raises.

    It grows in the folder of `path`, or in `temporary_folder`: one in the same file system, which its owner empties.
    """
    if temporary_folder is None:
        _remove_leftovers(path)
    temporary = _temporary(path, temporary_folder)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    flush_to_disk(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder that becomes `path`, files and all, when the block ends, and disappears if the block raises.

    If another writer was faster, its folder stays and this one disappears. Subfolders are not supported.
    """
    _remove_leftovers(path)
    temporary = _temporary(path)
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            flush_to_disk(file)
        flush_to_disk(temporary)
        try:
            os.rename(temporary, path)
        except OSError:
            if not path.is_dir():
                raise
            shutil.rmtree(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """Makes a file durable, or a rename within a folder: the directory entry is data of the folder, not of the file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_json_lines(path: Path, rows: Iterable[Any], *, durable: bool = True) -> None:
    """Appends each row as one line of JSON, and creates the file if necessary. OSError if not all can be written.

    With `durable` the lines outlive a power failure once the call returns; without, a kill of the process only.
    """
    content = json_lines(rows)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with _locked(file):
            torn = _mend_last_line(file)
            size = os.fstat(file).st_size
            try:
                write_all(file, content)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(file, size)
                raise
        if durable:
            os.fsync(file)
    finally:
        os.close(file)
    if torn:
        say(f"fastvit: {path} ended in half a line, {torn} bytes, which were removed", file=sys.stderr)


def json_lines(rows: Iterable[Any]) -> bytes:
    """The content of a file of JSON lines. ValueError if a number is not finite: JSON has none such."""
    return b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows)


def read_json_lines(
    path: Path, problem_of: Callable[[dict[str, Any]], str | None] = lambda row: None, named: str | None = None
) -> list[dict[str, Any]]:
    """The JSON objects of the file, one per line. Half a line at its end, left by a killed writer, is left out.

    So is any other line that is not a JSON object, or in which `problem_of` finds a problem ("is not an event"): stderr
    names the first of them and says how many there are. OSError if the file cannot be read. named: what to call the
    file, if not by its path.
    """
    rows, first, damaged = [], "", 0
    with open(path, "rb") as file:
        for number, (line, ended) in enumerate(_lines(file), start=1):
            try:
                row = _parse(line)
                if (problem := problem_of(row)) is not None:
                    raise ValueError(problem)
                rows.append(row)
            except ValueError as error:
                if ended:  # an object that lacks only its newline is whole, and anything else has not been written yet
                    first = first or f"line {number} {error}"
                    damaged += 1
    if damaged:
        more = f", and {damaged - 1:,} more" * (damaged > 1)
        print(f"fastvit: {named or path} {first}{more}: left out", file=sys.stderr)
    return rows


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """The lines of a file, each with whether a newline ends it; no more than the beginning of one that is too long."""
    while line := file.readline(_LONGEST_LINE + 1):
        end = line
        while len(line) > _LONGEST_LINE and end and not end.endswith(b"\n"):
            end = file.readline(_BLOCK)
        yield line.removesuffix(b"\n"), end.endswith(b"\n")


def _parse(line: bytes) -> dict[str, Any]:
    """The object in a line; ValueError with what is wrong with it."""
    if len(line) > _LONGEST_LINE:
        raise ValueError("is too long")
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):  # ValueError: also text that is not UTF-8, and numbers of too many digits
        raise ValueError("is not JSON") from None
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    return row


def _mend_last_line(file: int) -> int:
    """Ends the file with a newline: removes half a line, and returns its bytes, or completes a whole one."""
    size = os.fstat(file).st_size
    start = _last_line_start(file, size)
    if start == size:
        return 0
    try:
        _parse(os.pread(file, min(size - start, _LONGEST_LINE + 1), start))
    except ValueError:
        os.ftruncate(file, start)
        return size - start
    write_all(file, b"\n")
    return 0


def _last_line_start(file: int, size: int) -> int:
    end = size
    while end > 0:
        start = max(0, end - _BLOCK)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def write_all(file: int, content: bytes) -> None:
    """Writes to a file descriptor. Raises OSError if not all can be written.

    One write as a rule, so that lines never mix; a full disk takes a part of it first, and says so at the rest.
    """
    left = memoryview(content)
    while left:
        left = left[os.write(file, left) :]


@contextlib.contextmanager
def _locked(file: int) -> Iterator[None]:
    """Holds the lock of an open file, if the file system has locks and its holder lets go within a few seconds."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                break
            time.sleep(0.002)
        except OSError:  # there are no locks here
            break
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)  # also for a child that was forked meanwhile


def _temporary(path: Path, folder: Path | None = None) -> Path:
    """A name that belongs to this call alone, whatever machines write to the folder, and that tells who writes."""
    return (folder or path.parent) / f".{path.name}.{this_machine()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"


@functools.cache
def this_machine() -> str:
    """This machine since its start, and this container: within it, a process id has one meaning."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = socket.gethostname()
    return hashlib.blake2b(boot.encode(), digest_size=6).hexdigest()


def _remove_leftovers(path: Path) -> None:
    """Removes the temporary files and folders of `path` whose writers were killed."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.([0-9a-f]{{12}})\.(\d+)\.[0-9a-f]{{8}}\.tmp")
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            match = pattern.fullmatch(entry.name)
            if match is None:
                continue
            with contextlib.suppress(OSError):
                abandoned = time.time() - entry.stat().st_mtime > _ABANDONED_SECONDS
                if abandoned or (match[1] == this_machine() and not is_alive(int(match[2]))):
                    shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)


def is_alive(process: int) -> bool:
    """Whether a process of this machine exists; one that its parent has not yet waited for counts, too."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to somebody else
        return True
    return True
