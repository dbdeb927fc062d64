"""Object stores: s3://, gs:// and az:// (abfs://), through obstore.

Endpoints and credentials come from the environment, under the names that AWS, Google and Azure give them, and from
their usual files; see docs/data.md. Every method raises Missing, Exists or another Refused if the store says no,
AttemptFailed if it has not answered after all attempts, and UserError if obstore is not installed.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from fastvit_engine.errors import UserError
from fastvit_engine.shown import public_url
from fastvit_engine.storage.source import AttemptFailed, BehindEnd, Exists, Missing, Refused, Reply
from fastvit_engine.storage.store_calls import ObjectInfo, StoreConfig, relevant_environment
from fastvit_engine.storage.store_process import call

__all__ = ["ObjectInfo", "Store", "is_store", "open_store", "store_failures"]

_KINDS = {"s3": "s3", "s3a": "s3", "s3n": "s3", "gs": "gs", "gcs": "gs", "az": "az", "azure": "az"}
_KINDS |= dict.fromkeys(("abfs", "abfss", "adl"), "az")
_MAGIC = re.compile(r"[*?[]")


def is_store(url: str) -> bool:
    """Whether a URL has a scheme of an object store."""
    return url.partition("://")[0].lower() in _KINDS and "://" in url


def open_store(url: str, *, timeout: float = 30.0, retries: int = 5, patience: float = 180.0) -> "tuple[Store, str]":
    """The store (a bucket) that a URL leads to, and the key of the object or folder in it. Asks no server.

    timeout: seconds without a byte after which an attempt has failed.
    retries, patience: attempts after the first, and seconds after which no other begins.
    """
    scheme = url.partition("://")[0].lower()
    if not is_store(url):
        raise UserError(
            f"{public_url(url)} cannot be opened: {scheme}:// is not a kind of storage that is known; use s3://, "
            "gs://, az://, http(s):// or a path"
        )
    if find_spec("obstore") is None:
        raise UserError(f"{public_url(url)} cannot be opened without obstore: pip install obstore")
    bucket, _, key = url.partition("://")[2].partition("/")
    if not bucket:
        raise UserError(f"{public_url(url)} names no bucket: write {scheme}://BUCKET/NAME")
    kind = _KINDS[scheme]
    # Azure: CONTAINER, or CONTAINER@ACCOUNT.dfs.core.windows.net
    root = f"abfss://{bucket}/" if kind == "az" and "@" in bucket else f"{kind}://{bucket}"
    return Store(StoreConfig(kind, root, timeout, retries, patience, relevant_environment())), key.strip("/")


@contextlib.contextmanager
def store_failures(url: str) -> Iterator[None]:
    """Raises OSError, or one of its classes that says what is missing, instead of the errors of a store."""
    where = public_url(url)
    try:
        yield
    except Missing as error:
        raise FileNotFoundError(f"{where}: {error}") from error
    except Exists as error:
        raise FileExistsError(f"{where}: {error}") from error
    except Refused as error:
        raise PermissionError(f"{where}: {error}") from error
    except AttemptFailed as error:
        raise OSError(f"{where}: {error}") from error


@dataclass(frozen=True)
class Store:
    """A bucket. Threads may share one, and it may be pickled or used in a forked process."""

    config: StoreConfig

    def open(self, key: str, start: int = 0, stop: int | None = None) -> Reply:
        """Bytes [start, stop) of an object, up to the end if `stop` is None, in chunks; with one request."""
        items = call("get", self.config, key, start, stop)
        try:
            offset, size, version = next(items)
        except BehindEnd:
            info = self.head(key)
            return Reply(start, info.size, info.version, iter(()))
        return Reply(offset, size, version, items)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """As `open`, whole."""
        reply = self.open(key, start, stop)
        chunks = list(reply.chunks)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def head(self, key: str) -> ObjectInfo:
        found: ObjectInfo
        (found,) = call("head", self.config, key)
        return found

    def exists(self, key: str) -> bool:
        try:
            self.head(key)
        except Missing:
            return False
        return True

    def list_all(self, folder: str) -> Iterator[ObjectInfo]:
        """All objects under a folder, at any depth, in no certain order; none if there is no such folder."""
        for infos in call("list_all", self.config, folder):
            yield from infos

    def list_folder(self, folder: str) -> list[ObjectInfo]:
        """The objects and folders right in a folder; none if there is no such folder."""
        return [info for infos in call("list_folder", self.config, folder) for info in infos]

    def glob(self, pattern: str) -> list[str]:
        """The keys that match; "*", "?" and "[...]" match no "/", "**" does."""
        fixed = _MAGIC.split(pattern, maxsplit=1)[0].rpartition("/")[0]
        if "/" in pattern[len(fixed) + 1 :] or "**" in pattern:
            infos: Iterable[ObjectInfo] = self.list_all(fixed)
        else:
            infos = self.list_folder(fixed)
        matches = re.compile(_regex(pattern)).fullmatch
        return sorted(info.key for info in infos if not info.is_folder and matches(info.key))

    def write(self, key: str, content: bytes, *, create: bool = False) -> None:
        """Writes a whole object at once. With `create`, raises Exists if it exists: one writer succeeds."""
        for _ in call("put", self.config, key, bytes(content), create):
            pass

    def write_stream(self, key: str, chunks: Iterable[Any]) -> None:
        """Writes an object of any size from chunks (bytes-like); it appears when all of them have arrived."""
        for _ in call("put_stream", self.config, key, chunks=chunks):
            pass

    def delete(self, *keys: str) -> None:
        """Removes objects; those that do not exist are no error where the store does not say so (S3)."""
        if keys:
            for _ in call("delete", self.config, list(keys)):
                pass


def _regex(pattern: str) -> str:
    parts = re.split(r"(\*\*/?|\*|\?|\[[^]/]+\])", pattern)
    fixed = {"*": "[^/]*", "?": "[^/]", "**": ".*", "**/": "(?:.*/)?"}
    return "".join(fixed.get(part) or (_set(part) if part.startswith("[") else re.escape(part)) for part in parts)


def _set(part: str) -> str:
    """A set of characters, "[a-c]" or "[!a-c]"."""
    inner = part[1:-1].replace("\\", r"\\")
    return f"[^/{inner[1:]}]" if inner.startswith("!") else f"[{inner}]"
