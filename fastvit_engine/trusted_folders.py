"""Folders whose content is trusted, in or below shared ones such as /tmp: this user's, and nobody else may write there.

Whoever can write to a folder of compiled code chooses what the next run executes; to a cache of shards, what it reads.
"""

import contextlib
import getpass
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from fastvit_engine.errors import UserError

_COMPILED_CODE = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR")


def trusted_folder(path: Path, named: str) -> None:
    """Makes sure that no other user can write to a folder, if it is shared or lies below one where everybody may write.

    Shared folders may lie in each other if they are sticky, as /tmp is. Creates what is missing, with mode 0700 below a
    shared folder. Raises UserError, in which `named` says what the folder is set by; OSError if it cannot be created.
    """
    path = Path(os.path.abspath(path.expanduser()))
    below_shared = False
    for folder in [*path.parents[::-1], path]:
        try:
            status = os.lstat(folder)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):  # another process of this job may be faster
                os.mkdir(folder, 0o700 if below_shared else 0o777)
            status = os.lstat(folder)
        is_link = stat.S_ISLNK(status.st_mode)
        is_shared = bool(status.st_mode & stat.S_IWOTH) and not is_link
        if below_shared or (is_shared and folder == path):
            is_like_tmp = is_shared and folder != path and bool(status.st_mode & stat.S_ISVTX)
            _check(folder, status, named, may_be_written=is_link or is_like_tmp)
        if is_link:  # its target has parents of its own
            trusted_folder(folder.resolve() / path.relative_to(folder), named)
            return
        below_shared = below_shared or is_shared


def trust_compiled_code(environment: Mapping[str, str] = os.environ) -> None:
    """Checks, and creates, the folders in which Triton, Inductor and PyTorch's extensions keep compiled code.

    They load code from there without looking who wrote it. Raises UserError.
    """
    folders = {name: environment[name] for name in _COMPILED_CODE if environment.get(name)}
    if "TORCHINDUCTOR_CACHE_DIR" not in folders:  # the only one whose default is in a shared folder
        with contextlib.suppress(KeyError, OSError):  # this user has no name
            folders["TORCHINDUCTOR_CACHE_DIR"] = f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}"
    for name, folder in folders.items():
        try:
            trusted_folder(Path(folder), name)
        except OSError as error:
            raise UserError(
                f"{folder} ({name}) cannot be used for compiled code ({error.strerror}): set {name} to a folder of "
                "your own"
            ) from error


def _check(folder: Path, status: os.stat_result, named: str, *, may_be_written: bool) -> None:
    """Raises UserError unless a folder, or a link, is this user's or root's and nobody else may write to it."""
    remedy = f"remove it, or set {named} to a folder of your own"
    if status.st_uid not in (os.geteuid(), 0):
        raise UserError(f"{folder} ({named}) belongs to another user, who may put anything there: {remedy}")
    if not may_be_written and status.st_mode & (stat.S_IWOTH | stat.S_IWGRP):
        raise UserError(f"other users may write to {folder} ({named}): run chmod go-w on it if you trust what it holds")
