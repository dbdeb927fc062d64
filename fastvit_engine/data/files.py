"""Names of temporary files."""

import os
import socket
from pathlib import Path


def temporary_name(path: Path) -> Path:
    """Beside `path`, and of this process alone, also where several machines write to one folder."""
    return path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
