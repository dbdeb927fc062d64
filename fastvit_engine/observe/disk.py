"""The one policy for a disk that is full or lost, in training.

What a run needs is tried again for `PATIENCE_SECONDS`; after that the run ends with exit code 75, and continues from
its last checkpoint when it is started again: `metrics.jsonl`, `config.yaml`, `recovery.json`, the owner record and the
exported weights. So are checkpoints, see `checkpoint.checkpointer`. What is for people is left out, with one warning:
`events.jsonl`, `environment.json`, `samples.json`, `classes.json`, `reconstructions.json`, `bad_samples.jsonl`,
`trackers.json` and what trackers write.

Of a run in an object store, records that cannot be uploaded are a checkpoint that cannot be written.

A run folder that vanishes is neither: that run ends with exit code 2, because a restart would begin another run at
step 0 in its place.
"""

import errno
import os
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fastvit_engine.errors import RestartError, UserError
from fastvit_engine.shown import say

T = TypeVar("T")

PATIENCE_SECONDS = 60.0  # less than the watchdog's limits, unless they are set to less
_LONGEST_PAUSE = 5.0  # seconds
_FINAL = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.ENOENT, errno.EEXIST),  # of the folder above, or a file or a dangling link instead of the folder
}
_FINAL_TYPES = (PermissionError, NotADirectoryError, FileNotFoundError, FileExistsError)  # which stores raise without
_warned: set[str] = set()  # of what, by this process


def insist(
    action: Callable[[], T],
    what: str,
    *,
    instead: str | None = None,
    remedy: str = "make room on that disk or bring it back",
) -> T:
    """Returns what `action` returns, which writes `what` and is tried again if it raises OSError.

    Raises RestartError, with the remedy, if it has failed for `PATIENCE_SECONDS`. `instead`: what to choose another one
    of; then an error that time does not cure is a UserError at once.
    """
    began, pause, told = time.monotonic(), 0.1, False
    while True:
        try:
            return action()
        except OSError as error:
            if instead is not None and is_final(error):
                raise UserError(f"{what} cannot be written ({reason(error)}): choose another {instead}") from error
            waited = time.monotonic() - began
            if waited >= PATIENCE_SECONDS:
                raise RestartError(
                    f"{what} could not be written for {waited:.0f} s ({reason(error)}): {remedy}, and run "
                    "the same command again with --resume auto"
                ) from error
            if not told:
                told = True
                warn(f"{what} could not be written ({reason(error)}): trying again for {PATIENCE_SECONDS:.0f} s")
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def check_writable(folder: Path, what: str, *, instead: str) -> None:
    """Raises UserError if `folder` could not be made or written to, as far as that can be told without trying.

    what, instead: as of `insist`.
    """
    problem = 0
    for place in (folder.absolute(), *folder.absolute().parents):
        try:
            status = os.stat(place)
        except FileNotFoundError:
            if not place.is_symlink():
                continue
            problem = errno.EEXIST  # a link to nothing
        except OSError as error:
            problem = error.errno or errno.EIO
        else:
            if not stat.S_ISDIR(status.st_mode):
                problem = errno.EEXIST if place == folder.absolute() else errno.ENOTDIR
            elif not os.access(place, os.W_OK | os.X_OK):
                read_only = os.statvfs(place).f_flag & os.ST_RDONLY
                problem = errno.EROFS if read_only else errno.EACCES
        break
    if problem:
        raise UserError(f"{what} cannot be written ({os.strerror(problem)}): choose another {instead}")


def if_possible(action: Callable[[], object], what: str) -> bool:
    """Does what writes `what`; returns whether that went well. Only the first failure is a warning."""
    try:
        action()
    except OSError as error:
        if what not in _warned:
            _warned.add(what)
            warn(f"{what} could not be written ({reason(error)}): training continues without")
        return False
    return True


def is_final(error: OSError) -> bool:
    """Whether neither time nor another machine would help: the place is wrong, or not for this user."""
    return error.errno in _FINAL or isinstance(error, _FINAL_TYPES)


def unreadable(what: str, error: OSError) -> UserError | RestartError:
    """The exception for something that a run must read and cannot: a RestartError if another attempt may succeed."""
    kind = UserError if is_final(error) else RestartError
    return kind(f"{what} cannot be read ({reason(error)}): check the disk or the store, and start again")


def warn(text: str) -> None:
    say(f"fastvit: warning: {text}", file=sys.stderr)


def reason(error: OSError) -> str:
    """What went wrong, on one line."""
    return " ".join(str(error.strerror or error).split()) or type(error).__name__
