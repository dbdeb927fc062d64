"""Web servers, through urllib3.

Not through obstore, whose HTTP client refuses servers that ignore ranges, or that do not say how long a file is.
"""

import base64
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from urllib.parse import SplitResult, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.exceptions import HTTPError, LocationParseError, ProtocolError, ReadTimeoutError

from fastvit_engine.storage.source import MAY_PASS, AttemptFailed, Refused, Reply

CHUNK_BYTES = 2**18  # bytes
INVALID_URL = "the URL has a port or a character that no URL can have"
MAX_REDIRECTS = 5
MAX_SERVERS = 8  # whose connections are kept
MAX_CONNECTIONS = 32  # kept open to each server
MAX_RETRY_AFTER_S = 60.0


class HttpSource:
    """Threads share its connections, which stay open between reads; a forked process must make its own source."""

    def __init__(self) -> None:
        self._pools: dict[str | None, urllib3.PoolManager] = {}  # by proxy

    @contextmanager
    def open(self, url: str, start: int, stop: int | None, timeout: float) -> Iterator[Reply]:
        # Not even "bytes=0-" if all is asked for: some servers answer every range with 416 or 501.
        headers = {} if start == 0 and stop is None else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        with _failures(timeout):
            response = self._get(url, headers, timeout)
        try:
            yield _reply(response, start, timeout)
        finally:
            _end(response)

    def _get(self, url: str, headers: dict[str, str], timeout: float) -> urllib3.BaseHTTPResponse:
        """Returns the response that has the bytes, after redirects."""
        for _ in range(MAX_REDIRECTS + 1):
            response = self._request(url, headers, timeout)
            location = response.headers.get("Location")
            if response.status not in (301, 302, 303, 307, 308) or location is None:
                return response
            _end(response)
            url = urljoin(url, location)
        raise Refused(f"more than {MAX_REDIRECTS} redirects")

    def _request(self, url: str, headers: dict[str, str], timeout: float) -> urllib3.BaseHTTPResponse:
        parts = urlsplit(url)
        if not parts.hostname or parts.scheme not in ("http", "https"):
            raise Refused(f"{parts.scheme}://{parts.hostname or ''} names no web server")
        target = parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl()
        send = partial(
            self.pool(parts).request,
            "GET",
            target,
            headers={"Accept-Encoding": "identity", "User-Agent": "fastvit-engine", **headers, **authorization(parts)},
            timeout=urllib3.Timeout(connect=timeout, read=timeout),
            retries=False,
            redirect=False,
            preload_content=False,
            decode_content=False,
            enforce_content_length=False,  # a body that is cut short ends early, and `fetch` asks for the rest
        )
        try:
            return send()
        except ProtocolError:  # the server may have closed the idle connection meanwhile, which is no failure
            return send()

    def pool(self, parts: SplitResult) -> urllib3.PoolManager:
        """Connections to the servers of a scheme, through the proxy that the environment names."""
        proxy = getproxies().get(parts.scheme)
        if proxy is not None and proxy_bypass(parts.hostname or ""):
            proxy = None
        if proxy not in self._pools:
            kept = {"num_pools": MAX_SERVERS, "maxsize": MAX_CONNECTIONS, "ssl_context": _tls()}
            if proxy is None:
                self._pools[proxy] = urllib3.PoolManager(**kept)
            else:
                at = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
                address = at._replace(netloc=at.netloc.rpartition("@")[2]).geturl()
                self._pools[proxy] = urllib3.ProxyManager(
                    address, proxy_headers=authorization(at, "Proxy-Authorization"), **kept
                )
        return self._pools[proxy]


def _end(response: urllib3.BaseHTTPResponse) -> None:
    """Leaves the connection ready for the next request, or closes it if something of the body is left."""
    if response.length_remaining == 0:
        response.drain_conn()  # or http.client takes the response for unfinished
        response.release_conn()
    else:
        response.close()


@contextmanager
def _failures(timeout: float) -> Iterator[None]:
    """Turns errors of a connection into AttemptFailed or Refused."""
    try:
        yield
    except (LocationParseError, ValueError):  # whose message may quote a password or a signature
        raise Refused(INVALID_URL) from None
    except (OSError, HTTPError) as error:
        cause = _first_cause(error)
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise Refused(f"the server's certificate is not trusted: {cause.verify_message}") from error
        if isinstance(cause, TimeoutError) or isinstance(error, ReadTimeoutError):
            raise AttemptFailed(f"no answer for {timeout:g} seconds") from error
        raise AttemptFailed(str(cause) or type(cause).__name__) from error


def _first_cause(error: BaseException) -> BaseException:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _reply(response: urllib3.BaseHTTPResponse, start: int, timeout: float) -> Reply:
    headers = response.headers
    version = headers.get("ETag") or headers.get("Last-Modified")
    content_range = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", headers.get("Content-Range", "").strip())
    size = int(content_range[2]) if content_range and content_range[2] != "*" else None
    if response.status == 206 and content_range and content_range[1]:
        return Reply(int(content_range[1]), size, version, _chunks(response, timeout))
    if response.status == 200:
        return Reply(0, response.length_remaining, version, _chunks(response, timeout))
    if response.status == 416 and size is not None:  # the range lies behind the end
        return Reply(start, size, version, iter(()))
    reason = f"HTTP {response.status} {response.reason}".strip()
    if response.status >= 500 or response.status in MAY_PASS:
        seconds = headers.get("Retry-After", "")
        raise AttemptFailed(reason, min(float(seconds), MAX_RETRY_AFTER_S) if seconds.isdecimal() else 0.0)
    raise Refused(reason)


def _chunks(response: urllib3.BaseHTTPResponse, timeout: float) -> Iterator[bytes]:
    while True:
        with _failures(timeout):
            chunk: bytes = response.read1(CHUNK_BYTES)
        if not chunk:
            return
        yield chunk


def authorization(parts: SplitResult, header: str = "Authorization") -> dict[str, str]:
    """The header that says who asks, if a URL names a user."""
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {header: "Basic " + base64.b64encode(pair.encode()).decode()}


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()
