"""A web server on loopback that misbehaves by script, to test what reads from it."""

import hashlib
import re
import socket
import ssl
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_RESET = socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)  # close() sends a reset

Fault = tuple[Any, ...]


@dataclass
class FaultServer:
    """Serves `files`, by path, with ranges. Each request takes the next fault from the front of `faults[path]`:

    ("drop", n)      sends n bytes of the body and breaks the connection
    ("short", n)     sends n bytes of the body and ends the connection properly
    ("stall", n)     sends n bytes of the body and then nothing until `release` is set
    ("status", code, headers)  answers with this status
    ("no range",)    sends the whole file, whatever was asked
    ("chunked",)     sends the right bytes without telling their number
    ("slow", seconds)  sends the body in 50 pieces that take so long together
    ("hang up",)     behaves, and closes the connection without saying so
    None             behaves

    `always[path]` holds the fault for when the script has ended. `requests` lists what was asked: (path, Range header).
    """

    files: dict[str, bytes]
    faults: dict[str, list[Fault | None]] = field(default_factory=dict)
    always: dict[str, Fault] = field(default_factory=dict)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    connections: int = 0
    sent: Counter[str] = field(default_factory=Counter)  # bytes of bodies, by path
    release: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    tls: ssl.SSLContext | None = None
    port: int = 0

    def url(self, path: str) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}{path}"

    def next_fault(self, path: str) -> Fault | None:
        with self.lock:
            script = self.faults.get(path)
            return script.pop(0) if script else self.always.get(path)

    @contextmanager
    def running(self) -> Iterator["FaultServer"]:
        handler = type("Handler", (_Handler,), {"server_state": self})
        server = _Server(("127.0.0.1", 0), handler)
        if self.tls:
            server.socket = self.tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        self.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.release.set()
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)  # no shutdown before it, or a reset would come as an ordinary end

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # clients may go at any time
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_state: FaultServer

    def setup(self) -> None:
        super().setup()
        with self.server_state.lock:
            self.server_state.connections += 1

    def do_CONNECT(self) -> None:
        """A proxy's tunnel."""
        with self.server_state.lock:
            self.server_state.requests.append((self.path, None))
            self.server_state.headers.append(dict(self.headers))
        host, port = self.path.split(":")
        with socket.create_connection((host, int(port))) as target:
            self.send_response(200)
            self.end_headers()
            back = threading.Thread(target=_pump, args=(target, self.connection), daemon=True)
            back.start()
            _pump(self.connection, target)
            back.join()
        self.close_connection = True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        state, asked = self.server_state, self.headers.get("Range")
        path = re.sub(r"^http://[^/]+|\?.*$", "", self.path)  # a proxy is given the whole URL
        with state.lock:
            state.requests.append((path, asked))
            state.headers.append(dict(self.headers))
        fault = state.next_fault(path)
        kind = fault[0] if fault else None
        if kind == "status":
            return self._answer(fault[1], b"", fault[2] if len(fault) > 2 else {})
        if path not in state.files:
            return self._answer(404, b"not here", {})
        content = state.files[path]
        etag = hashlib.md5(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked or "")
        if match is None or kind == "no range":
            return self._send(path, 200, content, headers, fault)
        start, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
        if start >= len(content):
            return self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{last}/{len(content)}"
        return self._send(path, 206, content[start : last + 1], headers, fault)

    def _send(self, path: str, status: int, body: bytes, headers: dict[str, str], fault: Fault | None) -> None:
        if self.command == "HEAD":
            return self._head(status, headers | {"Content-Length": str(len(body))})
        kind, amount = (fault[0], fault[-1]) if fault else (None, None)
        if kind == "chunked":
            body_on_wire = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (body[:7], body[7:]) if p) + b"0\r\n\r\n"
            self._head(status, headers | {"Transfer-Encoding": "chunked"})
        else:
            body_on_wire = body
            self._head(status, headers | {"Content-Length": str(len(body))})
        if kind in ("drop", "short", "stall"):
            body_on_wire = body_on_wire[:amount]
        pieces = 50 if kind == "slow" else 1
        step = -(-len(body_on_wire) // pieces) or 1
        try:
            for start in range(0, len(body_on_wire), step):
                self.wfile.write(body_on_wire[start : start + step])
                with self.server_state.lock:
                    self.server_state.sent[path] += len(body_on_wire[start : start + step])
                if kind == "slow":
                    time.sleep(amount / pieces)
            if kind == "stall":
                self.server_state.release.wait(60)
        except OSError:  # the client has gone
            self.close_connection = True
        if kind == "drop":
            self.connection.setsockopt(*_RESET)
        if kind in ("drop", "short", "stall", "hang up"):
            self.close_connection = True

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._head(status, headers | {"Content-Length": str(len(body))})
        self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):  # either side may go at any time
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
