"""Unpacking a tar of our own."""

import shutil
import tarfile
from pathlib import Path, PurePosixPath


def unpack(archive: tarfile.TarFile, folder: Path) -> None:
    """Writes the files of an archive below a folder. Raises ValueError for a link, a device, or a path that leads out.

    Python has tarfile's filter "data", which does the same, only from 3.11.4 on.
    """
    for member in archive:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
            raise ValueError(f"the archive has {member.name!r}, which is no plain file or folder below its own")
        if member.isdir():
            (folder / path).mkdir(parents=True, exist_ok=True)
        elif (content := archive.extractfile(member)) is not None:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with content, (folder / path).open("wb") as file:
                shutil.copyfileobj(content, file)
