"""Checks the folders that a run writes to: whether it may, and how much room they have."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from fastvit_engine.doctor.findings import Finding, Group
from fastvit_engine.observe.units import format_bytes
from fastvit_engine.storage.local import local_path

_group = Group("disks")
_LEAST = 2**30  # bytes for compiled code, logs and temporary files


def folders_of(out: str, cache: str | None, checkpoints: str | None) -> dict[str, str]:
    """What a run writes to on this machine, by what it is called."""
    named = {"run folder": out, "checkpoints": checkpoints, "shard cache": cache, "TMPDIR": tempfile.gettempdir()}
    triton = os.environ.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton")
    named["compiled code"] = triton
    return {name: path for name, url in named.items() if url and (path := local_path(url)) is not None}


def check_disks(folders: Mapping[str, str], needs: Mapping[str, int]) -> Iterator[Finding]:
    """needs: bytes that should be free in a folder; others need a gibibyte."""
    for name, path in folders.items():
        yield _check_folder(name, Path(path).absolute(), needs.get(name, _LEAST))


def _check_folder(name: str, path: Path, need: int) -> Finding:
    variable = {"TMPDIR": "TMPDIR", "compiled code": "TRITON_CACHE_DIR", "shard cache": "data.cache"}.get(name)
    another = f"set {variable} to another folder" if variable else "choose another folder"
    existing = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    try:
        if not existing.is_dir():
            return _group.problem(name, f"{existing} is not a folder", f"remove it, or {another}")
        disk = os.statvfs(existing)
    except OSError as error:
        return _group.problem(name, f"{existing} cannot be used ({error.strerror})", another)
    free, total = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    if not os.access(existing, os.W_OK | os.X_OK):
        return _group.problem(name, f"this user may not write to {existing}", f"make it writable, or {another}")
    found = f"{format_bytes(free)} of {format_bytes(total)} free in {path}"
    figures = {"free_bytes": float(free)}
    if disk.f_files and not disk.f_favail:
        return _group.problem(name, f"{found}, and no inode: no file can be made", f"remove files there, or {another}")
    if free < need:
        return _group.warning(name, f"{found}: {format_bytes(need)} should be", f"make room, or {another}",
                              figures=figures, speed="free_bytes")  # fmt: skip
    return _group.ok(name, found, figures=figures, speed="free_bytes")
