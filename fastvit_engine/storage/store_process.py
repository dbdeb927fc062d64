"""Calls obstore in a process that will not be forked: this one if it can have no children, otherwise a helper process.

A process that is forked after obstore was used hangs in its next call (see `store_calls`). So:

* data workers and other daemonic processes, which `multiprocessing` lets have no children, call it themselves;
* every other process, such as a rank that forks its data workers, imports it never: it has a helper process, which
  is started afresh, and ends with it;
* so has a process that was forked from one that had imported obstore all the same.

A helper has a thread and a connection for each call in progress.
"""

import logging
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fastvit_engine.errors import UserError
from fastvit_engine.storage.source import AttemptFailed, Refused
from fastvit_engine.storage.store_calls import CALLS, StoreConfig, adopt_environment

log = logging.getLogger(__name__)

_HELPER = "from fastvit_engine.storage.store_process import main; main()"
_ITEM, _END, _ERROR = "item", "end", "error"
_forked_after_use = False


def call(name: str, config: StoreConfig, *arguments: Any, chunks: Iterable[Any] | None = None) -> Iterator[Any]:
    """The results of a call of `store_calls`, one by one. `chunks` is its last argument, if given."""
    if may_call_here():
        return CALLS[name](config, *arguments, *([] if chunks is None else [iter(chunks)]))
    return _helper.call(name, config, arguments, chunks)


def may_call_here() -> bool:
    """Whether this process may run obstore itself."""
    return multiprocessing.current_process().daemon and not _forked_after_use


class _Helper:
    """The helper process of this process, started when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._idle: list[Connection] = []

    def call(
        self, name: str, config: StoreConfig, arguments: tuple[Any, ...], chunks: Iterable[Any] | None
    ) -> Iterator[Any]:
        connection = self._connect()
        whole = False
        try:
            connection.send((name, config, arguments, chunks is not None))
            for chunk in chunks or ():
                if len(chunk):
                    connection.send_bytes(chunk)
            if chunks is not None:
                connection.send_bytes(b"")
            while True:
                kind, item = connection.recv()
                if kind != _ITEM:
                    break
                yield item
            whole = True
            if kind == _ERROR:
                raise item
        except (EOFError, ConnectionError) as error:
            raise AttemptFailed("the process that talks to the object store has ended") from error
        finally:
            if whole:
                self._idle.append(connection)
            else:
                connection.close()

    def _connect(self) -> Connection:
        with suppress(IndexError):
            return self._idle.pop()
        with self._lock:
            for last in (False, True):
                if self._control is None:
                    self._control = _start()
                ours, theirs = socket.socketpair()
                try:
                    with theirs:
                        socket.send_fds(self._control, [b"c"], [theirs.fileno()])
                    return Connection(ours.detach())
                except OSError as error:  # it was killed
                    ours.close()
                    self._control.close()
                    self._control = None
                    if last:
                        raise AttemptFailed("the process that talks to the object store cannot be reached") from error
        raise AssertionError("unreachable")

    def forget(self) -> None:
        """In a forked child: lets go of the parent's helper, which ends when nobody holds its socket."""
        if self._control is not None:
            self._control.close()
        for connection in self._idle:
            connection.close()


def _start() -> socket.socket:
    """Starts a helper; returns the socket over which it is given connections."""
    ours, theirs = socket.socketpair()
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    with theirs:
        subprocess.Popen(
            [sys.executable, "-c", _HELPER, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # a signal to this process's group must not take its last save away
        )
    return ours


_helper = _Helper()


def _restart() -> None:
    global _helper, _forked_after_use
    _forked_after_use = _forked_after_use or "obstore" in sys.modules
    _helper.forget()
    _helper = _Helper()


os.register_at_fork(after_in_child=_restart)


# ---- The helper's side


def serve(control: socket.socket) -> None:
    """Answers the calls of the process at the other end until that has closed it."""
    while True:
        try:
            message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        except OSError:
            return
        if not message:
            return
        for descriptor in descriptors:
            threading.Thread(target=_answer_all, args=(Connection(descriptor),), daemon=True).start()


def _answer_all(connection: Connection) -> None:
    with connection, suppress(EOFError, OSError):
        while True:
            name, config, arguments, has_chunks = connection.recv()
            chunks = _Incoming(connection) if has_chunks else None
            try:
                adopt_environment(config.environment)
                for item in CALLS[name](config, *arguments, *([] if chunks is None else [chunks])):
                    connection.send((_ITEM, item))
                answer = _END, None
            except (AttemptFailed, Refused, UserError) as error:
                answer = _ERROR, _alone(error)
            if chunks is not None:
                for _ in chunks:  # the caller sends all before it listens
                    pass
            connection.send(answer)


class _Incoming:
    """The chunks that the caller sends."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._ended = connection, False

    def __iter__(self) -> "Iterator[bytes]":
        return self

    def __next__(self) -> bytes:
        chunk = b"" if self._ended else self._connection.recv_bytes()
        if not chunk:
            self._ended = True
            raise StopIteration
        return chunk


def _alone(error: Exception) -> Exception:
    """The error, without what it was raised from."""
    error.__cause__ = error.__context__ = None
    error.__traceback__ = None
    pickle.dumps(error)
    return error


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it ends with its parent process
        signal.signal(number, signal.SIG_IGN)
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # without waiting for requests that nobody waits for
