"""Shards in object stores (s3://, gs://, ...) and whatever else fsspec supports."""

import errno
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from fsspec import AbstractFileSystem, get_filesystem_class
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.core import url_to_fs
from fsspec.exceptions import FSTimeoutError
from fsspec.utils import get_protocol

from fastvit_engine.errors import UserError
from fastvit_engine.shown import public_url, shown
from fastvit_engine.storage.source import MAY_PASS, AttemptFailed, Refused, Reply

CHUNK_BYTES = 2**23  # bytes: one request
VERSION_KEYS = (
    "ETag",
    "etag",
    "md5Hash",
    "mtime",
    "LastModified",
    "created",
)  # as stores name what changes with a file
# What stores report in OSError.errno for a request that will never succeed (bad bucket name, other region, ...).
FINAL_ERRNOS = {errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG, getattr(errno, "EREMCHG", errno.EPERM)}
# Classes of packages that may not be installed; none of them is an OSError.
FINAL_ERRORS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "ParamValidationError",
    "DefaultCredentialsError",
    "RefreshError",
}


def require_package(url: str) -> None:
    """Raises UserError naming the package that fsspec lacks for the URL."""
    try:
        get_filesystem_class(get_protocol(url))
    except (ImportError, ValueError) as error:
        raise UserError(f"{public_url(url)} cannot be opened: {error}") from error


class FsspecSource:
    """Reads by range. fsspec makes a new file system, with a new event loop, in a forked process.

    Stalls are detected on asynchronous file systems (s3, gs, az, ...); others have time limits of their own.
    """

    def __init__(self, url: str) -> None:
        require_package(url)
        self._known: dict[str, tuple[int, str | None]] = {}  # URL -> size and version

    def open(self, url: str, start: int, stop: int | None, timeout: float) -> AbstractContextManager[Reply]:
        with _failures(timeout):
            fs, path = url_to_fs(url)
        if url not in self._known:  # a ranged answer does not tell them
            info = _call(fs, "info", path, timeout=timeout)
            self._known[url] = info["size"], next((str(info[key]) for key in VERSION_KEYS if info.get(key)), None)
        size, version = self._known[url]
        stop = size if stop is None else stop
        return nullcontext(Reply(start, size, version, _chunks(fs, path, start, stop, timeout)))


def _chunks(fs: AbstractFileSystem, path: str, start: int, stop: int, timeout: float) -> Iterator[bytes]:
    for position in range(start, stop, CHUNK_BYTES):
        end = min(position + CHUNK_BYTES, stop)
        chunk = _call(fs, "cat_file", path, start=position, end=end, timeout=timeout)
        yield chunk
        if len(chunk) < end - position:
            return


def _call(fs: AbstractFileSystem, method: str, path: str, *, timeout: float, **arguments: Any) -> Any:
    """Calls a method of a file system; if it has an event loop, there and for at most `timeout` seconds."""
    with _failures(timeout):
        if isinstance(fs, AsyncFileSystem) and fs.async_impl:
            return sync(fs.loop, getattr(fs, f"_{method}"), path, timeout=timeout, **arguments)
        return getattr(fs, method)(path, **arguments)


@contextmanager
def _failures(timeout: float) -> Iterator[None]:
    """Turns errors of a file system into AttemptFailed or Refused."""
    try:
        yield
    except FileNotFoundError as error:
        raise Refused("it does not exist") from error
    except PermissionError as error:
        raise Refused(f"access is denied: {one_line(error)}") from error
    except (TimeoutError, FSTimeoutError) as error:
        raise AttemptFailed(f"no answer for {timeout:g} seconds") from error
    except Exception as error:  # each package has its own classes
        status = getattr(error, "status", None) or getattr(error, "code", None)
        final = (
            getattr(error, "errno", None) in FINAL_ERRNOS
            or type(error).__name__ in FINAL_ERRORS
            or (isinstance(status, int) and 400 <= status < 500 and status not in MAY_PASS)
        )
        raise (Refused if final else AttemptFailed)(one_line(error)) from error


def one_line(error: Exception) -> str:
    """Returns the first line of an exception's message, fit to be shown, or the name of its class."""
    return shown(next(iter(str(error).splitlines()), "")) or type(error).__name__
