"""Keeps some files of a wheel, and drops the rest: `python -m benchmarks.slim_wheel WHEEL PATTERN ...`.

For a machine to which little can be carried: of the 45 MB of nvidia-cuda-nvcc, ptxas is 16. Metadata always stays.
"""

import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path


def slim(wheel: Path, patterns: list[str]) -> int:
    """Rewrites the wheel with the files that match a pattern; their number. Raises ValueError if none does."""
    with zipfile.ZipFile(wheel) as whole:
        files = whole.infolist()
        kept = [file for file in files if any(fnmatch(file.filename, pattern) for pattern in patterns)]
        if not kept:
            raise ValueError(f"{wheel.name} has no file like {', '.join(patterns)}")
        about = [file for file in files if ".dist-info/" in file.filename]
        names = {file.filename for file in (*kept, *about)}
        temporary = wheel.with_suffix(".part")
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as part:
            for file in (*kept, *about):
                content = whole.read(file)
                if file.filename.endswith(".dist-info/RECORD"):  # must list what is there
                    rows = content.decode().splitlines(keepends=True)
                    content = "".join(row for row in rows if row.partition(",")[0] in names).encode()
                part.writestr(file, content)  # with the permissions it had
    temporary.replace(wheel)
    return len(kept)


def main(arguments: list[str]) -> int:
    if len(arguments) < 2:
        print(f"usage: {(__doc__ or '').splitlines()[0]}", file=sys.stderr)
        return 2
    try:
        count = slim(Path(arguments[0]), arguments[1:])
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        print(f"slim_wheel: {error}", file=sys.stderr)
        return 1
    print(f"{arguments[0]}: {count} files kept, {Path(arguments[0]).stat().st_size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
