"""Why a zip archive is no source, and how to make one of it."""

import shlex
import zipfile

from fastvit_engine.data.shards.remote_path import AnyPath


def why_not_read(path: AnyPath) -> str:
    """A sentence about a zip archive: images are read by position, which compression and encryption prevent."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            files = archive.infolist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        return f"the zip archive {path} is damaged ({error}): download it again"
    password = "objectnetisatestset" if path.name.startswith("objectnet") else "PASSWORD"  # as its authors say
    encrypted = any(file.flag_bits & 1 for file in files)
    folder = str(path).rpartition("/")[2].removesuffix(".zip")
    command = ["unzip", *(["-P", password] if encrypted else []), str(path), "-d", "DIR"]
    return (
        f"{path} is {'an encrypted' if encrypted else 'a'} zip archive, which is not read as it is: unpack it with "
        f"`{shlex.join(command)}`, and name the folder in DIR that holds the images, such as DIR/{folder}"
    )
