"""Shards on web servers, through http.client.

Not through fsspec's HTTP file system: that one needs aiohttp, waits far too long (by default five minutes) on a stalled
server, refuses to work after a fork, and took three times the CPU time of this module for a sample of 100 kB.
"""

import base64
import http.client
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from fastvit_engine.storage.source import MAY_PASS, AttemptFailed, Refused, Reply

CHUNK_BYTES = 2**18  # bytes
INVALID_URL = "the URL has a port or a character that no URL can have"
MAX_REDIRECTS = 5
MAX_CONNECTIONS = 8  # kept open by each thread, to different servers
MAX_RETRY_AFTER_S = 60.0


class HttpSource:
    """Each thread keeps its connections open between reads; a process must not use another's (see ShardStorage)."""

    def __init__(self) -> None:
        self._threads = threading.local()

    @contextmanager
    def open(self, url: str, start: int, stop: int | None, timeout: float) -> Iterator[Reply]:
        # Not even "bytes=0-" if all is asked for: some servers answer every range with 416 or 501.
        headers = {} if start == 0 and stop is None else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        with _failures(timeout):
            connection, response = self._get(url, headers, timeout)
        try:
            yield _reply(response, start, timeout)
        finally:
            # What is left of a body would be taken for the next answer.
            complete = response.isclosed() if response.length is None else response.length == 0
            response.close()
            if not complete:
                connection.close()

    def _get(
        self, url: str, headers: dict[str, str], timeout: float
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Returns the response that has the bytes, after redirects."""
        for _ in range(MAX_REDIRECTS + 1):
            connection, response = self._request(urlsplit(url), headers, timeout)
            location = response.headers.get("Location")
            if response.status not in (301, 302, 303, 307, 308) or location is None:
                return connection, response
            if response.length is not None and response.length <= CHUNK_BYTES:
                response.read()  # leaves the connection ready for the next request
            else:
                connection.close()
            url = urljoin(url, location)
        raise Refused(f"more than {MAX_REDIRECTS} redirects")

    def _request(
        self, parts: SplitResult, headers: dict[str, str], timeout: float
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connections = self._threads.__dict__.setdefault("connections", {})
        key = parts.scheme, parts.netloc
        if key not in connections:
            if len(connections) >= MAX_CONNECTIONS:
                connections.pop(next(iter(connections)))[0].close()
            connections[key] = _connection(parts, timeout)
        connection, by_proxy = connections[key]
        target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (f"?{parts.query}" if parts.query else "")
        if by_proxy:
            target = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{target}"
        headers = {"Accept-Encoding": "identity", "User-Agent": "fastvit-engine", **headers, **authorization(parts)}
        for fresh in (connection.sock is None, True):
            try:
                connection.request("GET", target, headers=headers)
                return connection, connection.getresponse()
            except (ConnectionError, http.client.BadStatusLine, ssl.SSLEOFError, ssl.SSLZeroReturnError):
                connection.close()
                if fresh:
                    raise  # otherwise the server had closed the idle connection, which is no failure
            except BaseException:
                connection.close()
                raise
        raise AssertionError("unreachable")


@contextmanager
def _failures(timeout: float) -> Iterator[None]:
    """Turns errors of a connection into AttemptFailed or Refused."""
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise Refused(f"the server's certificate is not trusted: {error.verify_message}") from error
    except (http.client.InvalidURL, ValueError):  # whose message may quote a password or a signature
        raise Refused(INVALID_URL) from None
    except TimeoutError as error:
        raise AttemptFailed(f"no answer for {timeout:g} seconds") from error
    except (OSError, http.client.HTTPException) as error:
        raise AttemptFailed(str(error) or type(error).__name__) from error


def _reply(response: http.client.HTTPResponse, start: int, timeout: float) -> Reply:
    headers = response.headers
    version = headers.get("ETag") or headers.get("Last-Modified")
    content_range = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", headers.get("Content-Range", "").strip())
    size = int(content_range[2]) if content_range and content_range[2] != "*" else None
    if response.status == 206 and content_range and content_range[1]:
        return Reply(int(content_range[1]), size, version, _chunks(response, timeout))
    if response.status == 200:
        return Reply(0, response.length, version, _chunks(response, timeout))
    if response.status == 416 and size is not None:  # the range lies behind the end
        return Reply(start, size, version, iter(()))
    reason = f"HTTP {response.status} {response.reason}".strip()
    if response.status >= 500 or response.status in MAY_PASS:
        seconds = headers.get("Retry-After", "")
        raise AttemptFailed(reason, min(float(seconds), MAX_RETRY_AFTER_S) if seconds.isdecimal() else 0.0)
    raise Refused(reason)


def _chunks(response: http.client.HTTPResponse, timeout: float) -> Iterator[bytes]:
    while True:
        with _failures(timeout):
            chunk = response.read1(CHUNK_BYTES)
        if not chunk:
            return
        yield chunk


def _connection(parts: SplitResult, timeout: float) -> tuple[http.client.HTTPConnection, bool]:
    """Returns a connection to the URL's server, and whether requests go to a proxy that needs the full URL."""
    host = parts.hostname
    if not host or parts.scheme not in ("http", "https"):
        raise Refused(f"{parts.scheme}://{host or ''} names no web server")
    proxy = getproxies().get(parts.scheme)
    if proxy is not None and not proxy_bypass(host):
        at = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        if parts.scheme == "http":
            return http.client.HTTPConnection(at.hostname or "", at.port, timeout=timeout), True
        tunnel = http.client.HTTPSConnection(at.hostname or "", at.port or 80, timeout=timeout, context=_tls())
        tunnel.set_tunnel(host, parts.port or 443, authorization(at, "Proxy-Authorization"))
        return tunnel, False
    if parts.scheme == "https":
        return http.client.HTTPSConnection(host, parts.port, timeout=timeout, context=_tls()), False
    return http.client.HTTPConnection(host, parts.port, timeout=timeout), False


def authorization(parts: SplitResult, header: str = "Authorization") -> dict[str, str]:
    """The header that says who asks, if a URL names a user."""
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {header: "Basic " + base64.b64encode(pair.encode()).decode()}


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()
