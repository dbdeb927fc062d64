"""A server that speaks as much of S3 as reading takes, fast enough not to be what is measured.

    python -m benchmarks.data_loading.s3_server FOLDER [--latency SECONDS]

Serves the files of FOLDER as http://127.0.0.1:PORT/BUCKET/NAME, for any BUCKET, without looking at signatures, and
prints PORT. It keeps files in memory. Each answer begins `--latency` seconds after its request; requests wait at the
same time.
"""

import argparse
import asyncio
import hashlib
import re
from pathlib import Path

_RANGE = re.compile(rb"\r\nrange: *bytes=(\d+)-(\d*)", re.IGNORECASE)
_NOT_FOUND = b"<Error><Code>NoSuchKey</Code></Error>"
_TIME = b"Thu, 01 Jan 2026 00:00:00 GMT"


class _Server:
    def __init__(self, folder: Path, latency: float) -> None:
        self.files = {path.name.encode(): path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self.tags = {name: hashlib.md5(content).hexdigest().encode() for name, content in self.files.items()}
        self.latency = latency

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                if self.latency:
                    await asyncio.sleep(self.latency)
                method, target, _ = request.split(b" ", 2)
                writer.writelines(self.reply(method, target.partition(b"?")[0].rpartition(b"/")[2], request))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def reply(self, method: bytes, name: bytes, request: bytes) -> list[bytes | memoryview]:
        content = self.files.get(name)
        if content is None:
            return [b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n" % len(_NOT_FOUND), _NOT_FOUND]
        asked = _RANGE.search(request)
        start, stop = 0, len(content)
        status, where = b"200 OK", b""
        if asked:
            start = int(asked[1])
            stop = min(int(asked[2]) + 1, stop) if asked[2] else stop
            status, where = (
                b"206 Partial Content",
                b"Content-Range: bytes %d-%d/%d\r\n" % (start, stop - 1, len(content)),
            )
        head = b'HTTP/1.1 %s\r\n%sContent-Length: %d\r\nETag: "%s"\r\nLast-Modified: %s\r\n\r\n' % (
            status,
            where,
            stop - start,
            self.tags[name],
            _TIME,
        )
        return [head] if method == b"HEAD" else [head, memoryview(content)[start:stop]]


async def _serve(folder: Path, latency: float) -> None:
    server = await asyncio.start_server(_Server(folder, latency).answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency", type=float, default=0.0)
    arguments = parser.parse_args()
    asyncio.run(_serve(arguments.folder, arguments.latency))
