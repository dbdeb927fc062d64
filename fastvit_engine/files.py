"""How files are written: whole or not at all."""

import contextlib
import os
import socket
import uuid
from pathlib import Path


def atomic_write(path: Path, content: str | bytes) -> None:
    """Writes `content` (text as UTF-8) so that `path` holds the old or the new content, whole, whenever power fails."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """Makes a file durable, or a rename within a folder: the directory entry is data of the folder, not of the file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """Beside `path`, and of this process alone, also where several machines write to one folder."""
    return path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
