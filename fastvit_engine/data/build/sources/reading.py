"""Reading one image of a listing."""

import http.client
import io
import os
import threading
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from fastvit_engine.data.build.sources.listing import Listing
from fastvit_engine.data.shards.archive import stamp_of
from fastvit_engine.data.shards.image_files import IMAGE_SUFFIXES
from fastvit_engine.data.shards.remote_path import is_remote
from fastvit_engine.data.shards.sample import parse_sample
from fastvit_engine.data.shards.tar import TarError
from fastvit_engine.shown import public_url
from fastvit_engine.storage import ShardStorage, remote_files
from fastvit_engine.storage.http import INVALID_URL, authorization

MAX_DOWNLOAD = 256 * 2**20  # bytes
_OPEN_FILES = 64
_RETRY_WAITS = (1.0, 3.0, 10.0)  # seconds before the second, third and fourth try
_RETRIED_CODES = (408, 425, 429, 500, 502, 503, 504)


class Encoded(NamedTuple):
    """An image of a source as the bytes that it comes in."""

    image: bytes
    json: bytes | None = None  # of a WebDataset sample that brings one


class SourceReader:
    """Reads images of a listing in any order; keeps a few files open."""

    def __init__(self, listing: Listing, timeout: float = 30.0) -> None:
        self._listing = listing
        self._timeout = timeout
        self._lock = threading.Lock()
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        self._remote: dict[str, ShardStorage] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return SourceReader, (self._listing, self._timeout)  # open files belong to a process

    def read(self, index: int) -> Encoded:
        """Raises OSError or ValueError if the image cannot be had; whether it is a whole image is not checked.

        Raises UserError if an object store refuses or does not answer: nothing is wrong with the image then.
        """
        kind, path, shape, _, fault, _ = self._listing.files[self._listing.file[index]]
        if fault:
            raise ValueError(fault)
        if kind == "url":
            return Encoded(self._whole(self._listing.name(index)))
        if kind == "path":
            if is_remote(path):
                return Encoded(self._whole(f"{path}/{self._listing.name(index)}"))
            return Encoded(Path(path, self._listing.name(index)).read_bytes())
        content = self._pread(path, int(self._listing.offset[index]), int(self._listing.size[index]))
        if kind == "pixels":
            return Encoded(_png(np.frombuffer(content, np.uint8).reshape(shape)))
        if kind == "sample":
            return _sample(content)
        return Encoded(content)

    def where(self, index: int) -> str:
        """The image's name, for people."""
        kind, path, _, shown, *_ = self._listing.files[self._listing.file[index]]
        name = self._listing.name(index)
        if kind in ("path", "url"):
            return public_url(os.path.join(path, name))
        return f"{name} in {shown or path}"

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _whole(self, url: str) -> bytes:
        """The content behind a URL."""
        on_web_server = url.startswith(remote_files.ON_WEB_SERVERS)
        return download(url, self._timeout) if on_web_server else remote_files.read(url)

    def _pread(self, path: str, offset: int, size: int) -> bytes:
        if is_remote(path):
            with self._lock:
                if path not in self._remote:
                    self._remote[path] = ShardStorage([path], [stamp_of(path)[0]])
            return self._remote[path].read(0, offset, size)
        with self._lock:
            if path not in self._descriptors:
                if len(self._descriptors) >= _OPEN_FILES:
                    os.close(self._descriptors.popitem(last=False)[1])
                self._descriptors[path] = os.open(path, os.O_RDONLY)
            self._descriptors.move_to_end(path)
            content = os.pread(self._descriptors[path], size, offset)
        if len(content) < size:
            raise ValueError(f"{path} ends before byte {offset + size}")
        return content


def download(url: str, timeout: float) -> bytes:
    """The content behind an http(s) URL. Raises OSError after four tries, or at once if the server refuses for good."""
    for wait in (*_RETRY_WAITS, None):
        try:
            with urllib.request.urlopen(_request(url), timeout=timeout) as response:
                content: bytes = response.read(MAX_DOWNLOAD + 1)
                announced = response.headers.get("Content-Length")
            if len(content) > MAX_DOWNLOAD:
                raise ValueError(f"has more than {MAX_DOWNLOAD:,} bytes")
            if announced is not None and announced.isdecimal() and len(content) < int(announced):
                raise http.client.IncompleteRead(content, int(announced) - len(content))
            return content
        except (http.client.InvalidURL, UnicodeError):  # whose message may quote a password or a signature
            raise OSError(INVALID_URL) from None
        except urllib.error.HTTPError as error:
            if wait is None or error.code not in _RETRIED_CODES:
                raise OSError(f"HTTP {error.code} {error.reason}") from error
        except urllib.error.URLError as error:
            if wait is None:
                raise OSError(str(error.reason)) from error
        except (OSError, http.client.HTTPException) as error:  # timeouts, resets, answers cut short
            if wait is None:
                raise OSError(str(error) or type(error).__name__) from error
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _request(url: str) -> urllib.request.Request:
    """The request for a URL, with its user name and password where they belong, and not for other servers."""
    parts = urlsplit(url)
    public = parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl()
    request = urllib.request.Request(public, headers={"User-Agent": "fastvit-engine"})
    for name, value in authorization(parts).items():
        request.add_unredirected_header(name, value)
    return request


def _sample(content: bytes) -> Encoded:
    try:
        sample = parse_sample(content, "")
    except TarError as error:
        raise ValueError(str(error)) from error
    image = next(sample[suffix[1:]] for suffix in IMAGE_SUFFIXES if suffix[1:] in sample)
    return Encoded(image, sample.get("json"))


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
